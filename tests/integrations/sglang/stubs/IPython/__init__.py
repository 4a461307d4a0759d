"""Stands in for IPython, of which SGLang wants two names for notebooks."""
