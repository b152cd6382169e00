#!/usr/bin/env bash
# Installs locked command-line tools into a folder of their own: `requirements/tools.sh FOLDER LOCK`.
set -euo pipefail
folder=${1:?a folder} lock=${2:?a lock file}
python=${PYTHON:-python3.11}

fail() {
  printf 'tools: %s\n' "$@" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "$python is not installed." "Install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11."
[ -x "$folder/bin/python" ] || "$python" -m venv --without-pip "$folder"
echo "== Installing locked tools ($lock) into $folder"
"$python" -m pip --python "$folder/bin/python" --disable-pip-version-check install --quiet --no-deps \
  --require-hashes --requirement "$lock" ||
  fail "The packages could not be installed." "The message above says which and why."
