{{/* How a pod is scheduled and secured: (dict "root" $ "component" "gateway" "pod" .Values.gateway.pod). */}}
{{- define "hscr.pod" -}}
{{- $pod := mergeOverwrite (deepCopy .root.Values.pods) (deepCopy .pod) -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{ range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $pod.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if .spread }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {matchLabels: {{ include "hscr.selector" (dict "root" $.root "component" $.component) | fromYaml | toJson }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "hscr.podMetadata" -}}
labels: {{ include "hscr.labels" . | nindent 2 }}
{{- with (mergeOverwrite (deepCopy .root.Values.pods) (deepCopy .pod)).labels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  checksum/settings: {{ include "hscr.settings" .root | sha256sum }}
{{- with (mergeOverwrite (deepCopy .root.Values.pods) (deepCopy .pod)).annotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- define "hscr.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "hscr.resources" -}}
{{- $pod := mergeOverwrite (deepCopy .root.Values.pods) (deepCopy .pod) -}}
{{- $resources := $pod.resources | default dict -}}
{{- if .gpus }}{{ $resources = mergeOverwrite (deepCopy $resources) (dict "limits" (dict .root.Values.compute.gpuResource .gpus)) }}{{ end -}}
resources: {{ toYaml $resources | nindent 2 }}
{{- end }}

{{/* Where the rows, the queue and the bytes are: (dict "root" $ "queue" true "blobs" true). */}}
{{- define "hscr.storeEnv" -}}
- {name: HSCR_HOME, value: {{ .root.Values.state.mountPath | quote }}}
{{- if .root.Values.postgres.enabled }}
- name: POSTGRES_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .root.Values.secrets.database }}, key: postgres-password}}
- {name: HSCR_DATABASE_URL, value: "postgresql+psycopg://hscr:$(POSTGRES_PASSWORD)@{{ include "hscr.name" .root }}-postgres:5432/hscr"}
{{- else }}
- name: HSCR_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ .root.Values.secrets.database }}, key: database-url}}
{{- end }}
{{- if .queue }}
{{- if .root.Values.redis.enabled }}
- {name: HSCR_REDIS_URL, value: "redis://{{ include "hscr.name" .root }}-redis:6379/0"}
{{- else }}
- name: HSCR_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .root.Values.secrets.redis }}, key: redis-url}}
{{- end }}
{{- end }}
{{- if and .blobs (include "hscr.bucket" .root) }}
- {name: HSCR_BLOBS_URL, value: {{ include "hscr.bucket" .root | quote }}}
{{- if .root.Values.objectStore.enabled }}
- {name: HSCR_S3_ENDPOINT, value: "http://{{ include "hscr.name" .root }}-object-store:9000"}
{{- else }}
{{- with .root.Values.objectStore.endpoint }}
- {name: HSCR_S3_ENDPOINT, value: {{ . | quote }}}
{{- if $.root.Values.tls.existingCaSecret }}
- {name: SSL_CERT_FILE, value: /etc/hscr/ca/ca.crt}
{{- end }}
{{- end }}
{{- with .root.Values.objectStore.region }}
- {name: HSCR_S3_REGION, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- with .root.Values.secrets.objectStore }}
- name: HSCR_S3_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: access-key-id}}
- name: HSCR_S3_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: secret-access-key}}
{{- end }}
{{- end }}
{{- end }}

{{/* The base model and how it computes: agent and workers must agree with the engine. */}}
{{- define "hscr.modelEnv" -}}
- {name: HSCR_MODEL_PATH, value: {{ include "hscr.modelPath" . }}}
- {name: HSCR_DEVICE, value: {{ .Values.compute.device | quote }}}
- {name: HSCR_DTYPE, value: {{ .Values.compute.dtype }}}
- {name: HSCR_TORCH_THREADS, value: {{ .Values.compute.threads | quote }}}
{{- end }}

{{- define "hscr.extraEnv" -}}
{{- range $name, $value := (mergeOverwrite (deepCopy .root.Values.pods) (deepCopy .pod)).env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "hscr.stateMount" -}}
- {name: state, mountPath: {{ .Values.state.mountPath }}}
{{- include "hscr.caMount" . }}
{{- end }}

{{/* The CA of an external database, queue and object store, where whoever reaches them has it. */}}
{{- define "hscr.caMount" }}
{{- if .Values.tls.existingCaSecret }}
- {name: ca, mountPath: /etc/hscr/ca, readOnly: true}
{{- end }}
{{- end }}

{{- define "hscr.caVolume" }}
{{- with .Values.tls.existingCaSecret }}
- name: ca
  secret: {secretName: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end }}

{{- define "hscr.modelMount" -}}
{{- if .Values.model.existingClaim }}
- {name: model, mountPath: /models/base, readOnly: true{{ with .Values.model.subPath }}, subPath: {{ . }}{{ end }}}
{{- end }}
{{- end }}

{{- define "hscr.stateVolume" -}}
- name: state
  {{- with include "hscr.claim" . }}
  persistentVolumeClaim: {claimName: {{ . }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- include "hscr.caVolume" . }}
{{- end }}

{{- define "hscr.modelVolume" -}}
{{- with .Values.model.existingClaim }}
- name: model
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Waits for tables of this version; the gateway also for a key, because it refuses to serve without one. */}}
{{- define "hscr.wait" -}}
- name: wait
  {{- include "hscr.image" (dict "root" .root "name" "gateway") | nindent 2 }}
  command: [sh, -c]
  args:
    - |
      until hscr db check{{ if .key }} && [ "$(hscr keys list --json)" != "[]" ]{{ end }}; do
        echo {{ if .key }}"waiting for tables of this version and for a first key (hscr keys create)"{{ else }}"waiting for tables of this version"{{ end }}
        sleep 2
      done
  env: {{ include "hscr.storeEnv" (dict "root" .root) | nindent 4 }}
  {{- include "hscr.containerSecurity" . | nindent 2 }}
  resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 256Mi}}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    {{- include "hscr.stateMount" .root | nindent 4 }}
{{- end }}

{{/* A process that serves no port touches this file while queue and database are there. A quarter of an hour of
patience, because an outage of theirs must not end a worker in the middle of its job, but one that never comes back from
an outage must be ended some time. */}}
{{- define "hscr.alive" -}}
livenessProbe:
  exec: {command: [python, -m, hscr.healthcheck, /tmp/alive]}
  initialDelaySeconds: 30
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 30
{{- end }}
