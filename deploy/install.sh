#!/bin/bash
# Inside a build, `install.sh VENV LOCK...`: install locks of requirements/, by hash.
set -euo pipefail
venv=$1
shift
if [ -s /run/secrets/ca-certificates ]; then # of a machine behind an inspecting proxy
  export PIP_CERT=/run/secrets/ca-certificates
fi
if [ -d /requirements/wheels ]; then
  export PIP_FIND_LINKS=/requirements/wheels
fi
for lock in "$@"; do
  pip --python "$venv/bin/python" install --no-deps --require-hashes --no-compile --only-binary :all: --quiet \
    --requirement "/requirements/$lock.txt"
done
