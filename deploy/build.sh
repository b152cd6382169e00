#!/usr/bin/env bash
# Builds the images and prints their sizes: `deploy/with-engine.sh deploy/build.sh [TARGET...]`, or `make images`.
#
# TORCH=cuda builds worker and engine for NVIDIA GPUs. BASE is the Debian 12 they stand on; where it cannot be
# pulled, a stand-in is made from Debian's packages.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=("${@:-gateway}")
[ $# -gt 0 ] || targets=(gateway worker engine)
base=${BASE:-debian:bookworm-slim}
torch=${TORCH:-cpu}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hscr/__init__.py)

fail() {
  printf 'images: %s\n' "$@" >&2
  exit 1
}

base() { # sets `base` to an image that is here
  "$DOCKER" image inspect "$base" > /dev/null 2>&1 && return
  timeout 60 "$DOCKER" pull --quiet "$base" 2> /dev/null && return
  printf '\n%s\n' "== ATTENTION: $base cannot be pulled. These images stand on a STAND-IN made from" \
    "==   Debian's packages (deploy/stand-in/base.sh): fit for checks, not for release." >&2
  base=hscr-stand-in-base:bookworm
  "$DOCKER" image inspect "$base" > /dev/null 2>&1 || deploy/stand-in/base.sh "$base"
}

wheels() { # torch's CPU build is not on PyPI: this machine's pip fetches it, so the build need not know from where
  [ "$torch" = cpu ] || return 0
  echo "== torch's CPU build into requirements/wheels"
  python3.11 -m pip download --quiet --no-deps --require-hashes --dest requirements/wheels \
    --requirement requirements/torch-cpu.txt ||
    fail "pip does not find torch's CPU build." "Give it PyTorch's CPU index by PIP_EXTRA_INDEX_URL, or set TORCH=cuda."
}

build() { # build TARGET
  local arguments=()
  for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_NO_INDEX http_proxy https_proxy no_proxy; do
    [ -z "${!name:-}" ] || arguments+=(--build-arg "$name")
  done
  [ ! -r "${PIP_CERT:-}" ] || arguments+=(--secret "id=ca-certificates,src=$PIP_CERT")
  "$DOCKER" build --target "$1" --tag "hscr-$1:$version" --network "${BUILD_NETWORK:-default}" \
    --build-arg "BASE=$base" --build-arg "TORCH=$torch" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$(git describe --always --dirty --abbrev=40)" \
    --build-arg "CREATED=$(TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd)" \
    "${arguments[@]}" .
}

base
case " ${targets[*]} " in *" worker "* | *" engine "*) wheels ;; esac
for target in "${targets[@]}"; do
  echo "== hscr-$target:$version on $base"
  build "$target"
done
printf '\n%-24s %10s\n' image "MB"
for target in "${targets[@]}"; do
  bytes=$("$DOCKER" image inspect --format '{{.Size}}' "hscr-$target:$version")
  printf '%-24s %10d\n' "hscr-$target:$version" $((bytes / 1000000))
done
