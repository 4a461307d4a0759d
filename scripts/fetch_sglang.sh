#!/usr/bin/env bash
# Fetch SGLang beside the environment of make_env.sh, for its tests, which skip where it is not.
#
#   scripts/fetch_sglang.sh [DIRECTORY]     default: .venv/opt/sglang, where the tests look
#
# It cannot be installed into the environment: it pins other versions of what vLLM needs too. About
# 260 MB of downloads, 900 MB on disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements/sglang-cpu-py311.lock
site="${1:-.venv/opt/sglang}"
stamp="$site/.installed-$(sha256sum "$lock" | cut -c1-16)"
[ -e "$stamp" ] && exit
rm -rf "$site" "$site.part"
mkdir -p "$(dirname "$site")"
.venv/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps \
  --target "$site.part" -r "$lock"
mv "$site.part" "$site"
touch "$stamp"
