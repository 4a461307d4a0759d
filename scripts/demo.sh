#!/usr/bin/env bash
# Serve a small model on our attention backend, show its text, prove that our kernels made it, and
# compare tokens and throughput with a stock backend of the engine's.
#
#   scripts/demo.sh [--engine vllm|sglang] [more arguments of scripts/demo.py or demo_sglang.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_env.sh
demo=scripts/demo.py
if [[ " $* " == *" --engine sglang "* || " $* " == *" --engine=sglang "* ]]; then
  scripts/fetch_sglang.sh
  demo=scripts/demo_sglang.py
fi
# One parallel build before the server starts, so that its start is not spent compiling.
.venv/bin/fi-backend warmup --model models/fi-tiny/config.json --dtype float32
exec .venv/bin/python "$demo" "$@"
