{{- define "rock.labels" -}}
app.kubernetes.io/name: rock
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "rock.selector" -}}
app.kubernetes.io/name: rock
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "rock.workers.namespace" -}}
{{ .Values.workers.namespace | default .Release.Namespace }}
{{- end }}

{{- define "rock.secret" -}}
{{ .Values.secret.existing | default (printf "%s-keys" .Release.Name) }}
{{- end }}

{{- define "rock.admin.url" -}}
http://{{ .Release.Name }}-admin.{{ .Release.Namespace }}:{{ .Values.admin.port }}
{{- end }}

{{- define "rock.reader.url" -}}
http://{{ .Release.Name }}-reader.{{ .Release.Namespace }}:{{ .Values.admin.port }}
{{- end }}

{{/* A value combination that could not work is refused here, with what to do. */}}
{{- define "rock.check" -}}
{{- if not (has .Values.mode (list "workers" "pod")) }}{{ fail "mode is workers or pod" }}{{ end }}
{{- if not (has .Values.store.kind (list "sqlite" "postgres")) }}{{ fail "store.kind is sqlite or postgres" }}{{ end }}
{{- if not (has .Values.workers.level (list "A" "B" "C" "D")) }}{{ fail "workers.level is A, B, C or D" }}{{ end }}
{{- if and (eq .Values.store.kind "sqlite") (or (gt (int .Values.admin.replicas) 1) (gt (int .Values.reader.replicas) 0)) }}
{{- fail "several admins or readers need store.kind postgres" }}{{ end }}
{{- if and .Values.monitoring.keda.enabled .Values.monitoring.hpa.enabled }}{{ fail "monitoring.keda and monitoring.hpa scale the same workers: enable one of them" }}{{ end }}
{{- if not .Values.secret.existing }}
{{- if or (not .Values.secret.apiKey) (not .Values.secret.workerKey) }}{{ fail "set secret.apiKey and secret.workerKey, or secret.existing" }}{{ end }}
{{- if eq .Values.secret.apiKey .Values.secret.workerKey }}{{ fail "secret.apiKey and secret.workerKey are the same: workers would have all rights" }}{{ end }}
{{- if and (eq .Values.store.kind "postgres") (not .Values.store.url) }}{{ fail "store.kind postgres needs store.url, or secret.existing with store-url" }}{{ end }}
{{- end }}
{{- if and .Values.secret.existing .Values.workers.namespace (ne .Values.workers.namespace .Release.Namespace) }}{{/* the Secret must exist in both */}}{{ end }}
{{- end }}

{{/* The environment of admins and readers. */}}
{{- define "rock.server.env" -}}
- name: ROCK_API_KEY
  valueFrom: {secretKeyRef: {name: {{ include "rock.secret" .root }}, key: api-key}}
- name: ROCK_WORKER_KEY
  valueFrom: {secretKeyRef: {name: {{ include "rock.secret" .root }}, key: worker-key}}
{{- if eq .root.Values.store.kind "postgres" }}
- name: ROCK_STORE
  valueFrom: {secretKeyRef: {name: {{ include "rock.secret" .root }}, key: store-url}}
{{- end }}
- {name: ROCK_ROLE, value: {{ .role | quote }}}
- {name: ROCK_WORKERS, value: "none"}
- {name: ROCK_LOG_FORMAT, value: "json"}
- {name: ROCK_DRAIN_SECONDS, value: "20"}
{{- if eq .role "read" }}
- {name: ROCK_WRITER, value: {{ include "rock.admin.url" .root | quote }}}
{{- else if gt (int .root.Values.reader.replicas) 0 }}
- {name: ROCK_READER, value: {{ include "rock.reader.url" .root | quote }}}
{{- end }}
{{- if and (eq .root.Values.mode "workers") .root.Values.monitoring.keda.enabled (ne .role "read") }}
# A create waits for the worker that KEDA adds.
- {name: ROCK_CAPACITY_WAIT, value: {{ .root.Values.monitoring.keda.capacityWait | quote }}}
{{- end }}
{{- if eq .root.Values.mode "pod" }}
- {name: ROCK_SCHEDULER, value: "kubernetes"}
- {name: ROCK_KUBERNETES_NAMESPACE, value: {{ include "rock.workers.namespace" .root | quote }}}
- {name: ROCK_KUBERNETES_INSTANCE, value: {{ .root.Release.Name | quote }}}
- {name: ROCK_KUBERNETES_KIND, value: {{ .root.Values.pod.kind | quote }}}
- {name: ROCK_KUBERNETES_TEMPLATES, value: /etc/rock/templates.yaml}
- {name: ROCK_KUBERNETES_QPS, value: {{ .root.Values.pod.qps | quote }}}
- {name: ROCK_ADVERTISE, value: {{ include "rock.admin.url" .root | quote }}}
{{- end }}
{{- if and .root.Values.liveConfig (ne .role "read") }}
- {name: ROCK_LIVE_CONFIG, value: /etc/rock-live/config.yaml}
{{- end }}
{{- range $name, $value := .root.Values.admin.settings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "rock.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  tcpSocket: {port: http}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{- define "rock.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The security context of a worker's container, by level. docs/guides/kubernetes.md has the table. */}}
{{- define "rock.worker.security" -}}
{{- if eq .Values.workers.level "A" -}}
runAsUser: 0
allowPrivilegeEscalation: true
procMount: Unmasked
seccompProfile: {{ toYaml .Values.workers.seccompProfile | nindent 2 }}
appArmorProfile: {type: Unconfined}
capabilities:
  drop: [ALL]
  add: [SYS_ADMIN, NET_ADMIN, SETUID, SETGID, SETPCAP, CHOWN, DAC_OVERRIDE, FOWNER, KILL, MKNOD, SYS_CHROOT, SYS_PTRACE]
{{- else if eq .Values.workers.level "B" -}}
runAsUser: 1000
runAsGroup: 1000
allowPrivilegeEscalation: true
procMount: Unmasked
seccompProfile: {{ toYaml .Values.workers.seccompProfile | nindent 2 }}
appArmorProfile: {type: Unconfined}
capabilities: {drop: [ALL]}
{{- else if eq .Values.workers.level "C" -}}
privileged: true
{{- else -}}
runAsUser: 0
allowPrivilegeEscalation: false
seccompProfile: {type: RuntimeDefault}
capabilities: {drop: [NET_RAW]}
{{- end }}
{{- end }}
