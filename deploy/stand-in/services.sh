#!/usr/bin/env bash
# Builds the stand-ins of Redis and PostgreSQL for `make test-images`.
set -euo pipefail
cd "$(dirname "$0")"
base=hscr-stand-in-base:bookworm
"$DOCKER" image inspect "$base" > /dev/null 2>&1 || ./base.sh "$base"
for service in redis postgres; do
  "$DOCKER" build --quiet --target "$service" --tag "hscr-stand-in-$service:bookworm" \
    --network "${BUILD_NETWORK:-default}" .
done
