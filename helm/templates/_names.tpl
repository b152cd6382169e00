{{- define "hscr.name" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{/* Of a pod's selector and of policies: (dict "root" $ "component" "gateway"). */}}
{{- define "hscr.selector" -}}
app.kubernetes.io/name: {{ .root.Values.nameOverride | default .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The same without the component: every pod of this release. */}}
{{- define "hscr.everyPod" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hscr.labels" -}}
{{ include "hscr.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* (dict "root" $ "name" "gateway"): a digest counts instead of a tag. */}}
{{- define "hscr.image" -}}
{{- $image := index .root.Values.images .name -}}
{{- $repository := $image.repository -}}
{{- with .root.Values.images.registry }}{{ $repository = printf "%s/%s" . $repository }}{{ end -}}
image: {{ if $image.digest }}{{ printf "%s@%s" $repository $image.digest }}{{ else }}{{ printf "%s:%s" $repository ($image.tag | default .root.Chart.AppVersion) }}{{ end }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
{{- end }}

{{/* The chart's defaults for a worker group, and what the group says: (dict "root" $ "group" $group). */}}
{{- define "hscr.workerGroup" -}}
{{- mergeOverwrite (deepCopy .root.Values.workers.defaults) (deepCopy .group) | toYaml -}}
{{- end }}

{{/* Kinds of jobs on these queues, as SQL literals. */}}
{{- define "hscr.kinds" -}}
{{- $of := dict "control" (list "release") "evaluate" (list "evaluate") "generate" (list "generate") "score" (list "score" "score_answer") "finetune" (list "finetune") -}}
{{- $kinds := list -}}
{{- range . }}{{ $kinds = concat $kinds (index $of .) }}{{ end -}}
{{- range $i, $kind := $kinds }}{{ if $i }}, {{ end }}'{{ $kind }}'{{ end -}}
{{- end }}

{{/* The longest a pod may take to end: nothing new arrives, the longest answer ends, a margin. */}}
{{- define "hscr.grace" -}}
{{- add .Values.gateway.settleSeconds .Values.gateway.requestDeadlineSeconds 20 -}}
{{- end }}

{{- define "hscr.modelPath" -}}
{{ if .Values.model.existingClaim }}/models/base{{ else }}/models/phantom{{ end }}
{{- end }}

{{/* Where images and adapters are: a bucket, or else a claim that all pods mount. */}}
{{- define "hscr.bucket" -}}
{{ if .Values.objectStore.enabled }}s3://hscr{{ else }}{{ .Values.objectStore.url }}{{ end }}
{{- end }}

{{- define "hscr.claim" -}}
{{ if .Values.state.existingClaim }}{{ .Values.state.existingClaim }}{{ else if .Values.state.shared }}{{ include "hscr.name" . }}-state{{ end }}
{{- end }}

{{- define "hscr.checks" -}}
{{- $taken := list -}}
{{- range $name, $group := .Values.workers.groups -}}
{{- $group = include "hscr.workerGroup" (dict "root" $ "group" $group) | fromYaml -}}
{{- if $group.enabled }}{{ $taken = concat $taken $group.queues }}{{ end -}}
{{- if and $group.autoscaling.jobs (not $group.autoscaling.enabled) }}{{ fail (printf "workers.groups.%s.autoscaling.jobs needs autoscaling.enabled." $name) }}{{ end -}}
{{- end -}}
{{- range list "control" "evaluate" "generate" "score" "finetune" -}}
{{- if not (has . $taken) }}{{ fail (printf "No worker takes the queue %q: add it to the queues of a group in workers.groups." .) }}{{ end -}}
{{- end -}}
{{- if and (eq .Values.engine.kind "vllm") (not .Values.model.existingClaim) }}{{ fail "engine.kind is vllm, but there is no model: set model.existingClaim to a claim that holds one." }}{{ end -}}
{{- if gt (int (.Values.settings.agent.adapter_slots | default 4)) (int .Values.engine.maxLoras) }}{{ fail "settings.agent.adapter_slots is larger than engine.maxLoras: the engine has no room for them." }}{{ end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.postgres.enabled) (not .Values.networkPolicy.database) }}{{ fail "The database is outside and egress is closed: name it in networkPolicy.database (or set postgres.enabled, or networkPolicy.enabled=false)." }}{{ end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.redis.enabled) (not .Values.networkPolicy.redis) }}{{ fail "Redis is outside and egress is closed: name it in networkPolicy.redis (or set redis.enabled, or networkPolicy.enabled=false)." }}{{ end -}}
{{- $places := 0 -}}
{{- range list .Values.objectStore.url .Values.objectStore.enabled (include "hscr.claim" .) }}{{ if . }}{{ $places = add1 $places }}{{ end }}{{ end -}}
{{- if eq (int $places) 0 }}{{ fail "Nothing says where images and adapters are: set objectStore.url to a bucket, or objectStore.enabled for a trial, or state.shared for one claim that all pods mount." }}{{ end -}}
{{- if gt (int $places) 1 }}{{ fail "objectStore.url, objectStore.enabled and state.shared (or state.existingClaim) are places for images and adapters: leave one." }}{{ end -}}
{{- if and .Values.objectStore.enabled (not .Values.secrets.objectStore) }}{{ fail "objectStore.enabled needs secrets.objectStore: the Secret with the key that opens it." }}{{ end -}}
{{- if and .Values.networkPolicy.enabled .Values.objectStore.url (not .Values.networkPolicy.objectStore) }}{{ fail "The object store is outside and egress is closed: name it in networkPolicy.objectStore (or set networkPolicy.enabled=false)." }}{{ end -}}
{{- if and .Values.gateway.httpRoute.enabled (not .Values.gateway.httpRoute.parentRefs) }}{{ fail "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs: the Gateway to attach to." }}{{ end -}}
{{- end }}
