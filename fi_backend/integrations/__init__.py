"""Adapters: each subpackage translates one serving engine's calls into fi_backend's core."""
