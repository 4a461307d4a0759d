#!/usr/bin/env bash
# Make the environment and run the whole test suite: linters, unit tests, real engines.
#
#   scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_env.sh --test

run() { .venv/bin/python -m "$@"; }
if [ "$#" -eq 0 ]; then
  run ruff check .
  run ruff format --check .
  git ls-files '*.h' '*.cuh' '*.cu' '*.cc' | xargs .venv/bin/clang-format --dry-run --Werror
  run mypy
  # Compile every kernel that the suite's main shapes need in one parallel graph, not one by one.
  for dtype in bfloat16 float32; do
    for head_dim in 64 128; do
      .venv/bin/fi-backend warmup --head-dim "$head_dim" --dtype "$dtype"
    done
  done
fi
exec .venv/bin/python -m pytest "$@"
