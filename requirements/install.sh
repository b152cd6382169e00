#!/usr/bin/env bash
# Installs the locked, hashed dependencies and this checkout into ./.venv: `requirements/install.sh runtime|dev`.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/${1:?runtime or dev}.txt
python=${PYTHON:-python3.11}

fail() {
  printf 'install: %s\n' "$@" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "$python is not installed." "Install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11."
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || fail "$python is not Python 3.11." "Set PYTHON=/path/to/python3.11."

if [ ! -x .venv/bin/pip ]; then
  rm -rf .venv
  "$python" -m venv .venv > /dev/null 2>&1 || {
    # Debian ships venv without ensurepip; a pip outside can fill in for it.
    rm -rf .venv
    "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install --quiet pip ||
      fail "No virtual environment could be made." "Install the venv module (Debian and Ubuntu: apt install python3.11-venv) and try again."
  }
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
locked() { # bytecode is compiled at first import: much of this is never imported
  pip install --no-deps --require-hashes --no-compile --progress-bar off "$@" |
    { grep --line-buffered -E '^ *(Downloading .* MB|Installing)' || true; } | cut -c 1-100
}

echo "== Installing locked dependencies ($lock) into .venv"
if [ "${TORCH:-cpu}" = cpu ] && locked -r requirements/torch-cpu.txt 2> /dev/null; then
  echo "== torch: CPU build"
else
  echo "== torch: CUDA build (several GB). On a machine without a GPU, give pip PyTorch's CPU index by PIP_EXTRA_INDEX_URL."
  locked -r requirements/torch-cuda.txt
fi
locked -r "$lock"
pip install --quiet --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch' || fail "torch does not import." "Remove .venv and run again; report the message above if it stays."
echo "== Ready: .venv/bin/hscr --help"
