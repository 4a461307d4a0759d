#!/usr/bin/env bash
# Serve a small model with vLLM on our attention backend, show its text, prove that our kernels made
# it, and compare tokens and throughput with vLLM's stock backend.
#
#   scripts/demo.sh [arguments of scripts/demo.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_env.sh
# One parallel build before the server starts, so that its start is not spent compiling.
.venv/bin/fi-backend warmup --model models/fi-tiny/config.json --dtype float32
exec .venv/bin/python scripts/demo.py "$@"
