#!/usr/bin/env bash
# checkov's rules for Kubernetes on the objects of each ci/ file. The exceptions, and why:
#   CKV_K8S_8, CKV_K8S_9   beat serves nothing and says nothing of itself; jobs and tests end; workers, relay and
#                          agent take no traffic, so that only their life is probed.
#   CKV_K8S_11             CPU limits throttle a process that shares a node with idle ones; memory is limited.
#   CKV_K8S_13             init containers and jobs have limits of memory; the rule wants them where none can be.
#   CKV_K8S_14, CKV_K8S_43 digests are given where they were resolved (images.*.digest); tags are versions.
#   CKV_K8S_15             tags are versions, so that a node may keep what it has.
#   CKV_K8S_21             the namespace is the one that is installed into.
#   CKV_K8S_35             the processes read their settings, secrets included, from the environment.
#   CKV_K8S_40             postgres and valkey run under their images' own numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."
objects=$(mktemp -d)
trap 'rm -r "$objects"' EXIT
for values in helm/ci/*.yaml; do
  .venv-chart/bin/helm template hscr helm --namespace clinic --values "$values" > "$objects/$(basename "$values")"
done
.venv-chart/bin/checkov --directory "$objects" --framework kubernetes --skip-download --compact --quiet
