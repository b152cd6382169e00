#!/usr/bin/env bash
# `with-engine.sh COMMAND...` runs a command with a Docker Engine: the one that answers, or else, as root, one that
# is started for it and stopped after it. DOCKER is the client, which builds with BuildKit.
set -euo pipefail

fail() {
  printf 'images: %s\n' "$@" >&2
  exit 1
}

client() { # clients since 23 need the plugin buildx to build with BuildKit, earlier ones have it built in
  local docker major
  for docker in $(type -ap docker); do
    major=$("$docker" --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/')
    if [ "$major" -lt 23 ] || "$docker" buildx version > /dev/null 2>&1; then
      echo "$docker"
      return
    fi
  done
  fail "No Docker client here can build with BuildKit." "Install one (Debian: apt-get install docker.io iptables)."
}

start() {
  command -v dockerd > /dev/null || fail "No Docker Engine answers and none is installed." "Start one, or install it (Debian: apt-get install docker.io iptables)."
  [ "$(id -u)" = 0 ] || fail "No Docker Engine answers, and only root can start one." "Start it (systemctl start docker), or run this as root."
  state=$(mktemp -d)
  echo "== Starting a Docker Engine for this command; its log: $state/log"
  # An engine that has to switch forwarding on also forbids it to everybody else's networks.
  echo 1 > /proc/sys/net/ipv4/ip_forward
  dockerd --pidfile "$state/pid" > "$state/log" 2>&1 &
  engine=$!
  trap stop EXIT
  for _ in $(seq 240); do
    "$DOCKER" info > /dev/null 2>&1 && return
    kill -0 "$engine" 2> /dev/null || break
    sleep 0.5
  done
  tail -n 20 "$state/log" >&2
  fail "The Docker Engine did not start." "Its log above says why; it needs to mount, and to set up iptables."
}

stop() {
  kill "$engine" 2> /dev/null || true
  wait "$engine" || true
}

DOCKER=${DOCKER:-$(client)}
export DOCKER DOCKER_BUILDKIT=1
"$DOCKER" info > /dev/null 2>&1 || start
"$@"
