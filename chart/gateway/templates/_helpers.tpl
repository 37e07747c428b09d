{{/* Labels of an object: (list $ "component"). */}}
{{- define "gateway.labels" -}}
{{- $root := index . 0 -}}
{{ include "gateway.podLabels" . }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Labels of a pod: without versions, so that a new chart version restarts no unchanged pod: (list $ "component"). */}}
{{- define "gateway.podLabels" -}}
app: {{ index . 1 }}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: gateway
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{- define "gateway.image" -}}
{{- with .Values.image -}}
{{ with .registry }}{{ . }}/{{ end }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* Security context of every pod: user, group, seccomp profile. */}}
{{- define "gateway.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Security context of every container. */}}
{{- define "gateway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Image pull secrets, node selector, affinity and tolerations of a pod. */}}
{{- define "gateway.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Spreads the replicas of a component over nodes: (list "component" nodes). `nodes` is the required minimum;
     with 0 the spread is only preferred. */}}
{{- define "gateway.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    {{- with index . 1 }}
    minDomains: {{ . }}
    {{- end }}
    whenUnsatisfiable: {{ gt (int (index . 1)) 0 | ternary "DoNotSchedule" "ScheduleAnyway" }}
    labelSelector:
      matchLabels:
        app: {{ index . 0 }}
{{- end }}

{{/* Overrides the chart's settings by the user's: (list settings map). `merge` would ignore false, 0 and "". */}}
{{- define "gateway.override" -}}
{{- range $name, $value := index . 1 }}
{{- $_ := set (index $ 0) $name $value }}
{{- end }}
{{- end }}

{{/* A map of settings as a container's env, sorted by name. A value that is a map becomes `valueFrom`. */}}
{{- define "gateway.env" -}}
{{- range $name, $value := . }}
{{- /* Helm parses whole numbers as floats, and would print them as 1e+06. */}}
{{- if kindIs "float64" $value }}
{{- if eq $value (floor $value) }}{{ $value = int64 $value }}{{ end }}
{{- end }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  valueFrom: {{- toYaml $value | nindent 4 }}
  {{- else }}
  value: {{ $value | toString | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "gateway.authSecret" -}}
{{ .Values.basicAuth.existingSecret | default "basic-auth" }}
{{- end }}

{{/* The user name in the Secret; before the Secret exists, the name that it is created with. */}}
{{- define "gateway.authUser" -}}
{{- $name := include "gateway.authSecret" . }}
{{- $live := lookup "v1" "Secret" .Release.Namespace $name | default dict }}
{{- dig "data" "basic-auth-user" "" $live | b64dec | trim | default .Values.basicAuth.user }}
{{- end }}

{{/* hasQueue: whether there is a queue; hasWorker: whether a worker executes its calls: "yes" or nothing. */}}
{{- define "gateway.hasQueue" -}}
{{- if ne .Values.queue.backend "none" }}yes{{ end }}
{{- end }}
{{- define "gateway.hasWorker" -}}
{{- if and (include "gateway.hasQueue" .) (gt (int .Values.worker.replicas) 0) }}yes{{ end }}
{{- end }}
{{- define "gateway.hasProvider" -}}
{{- if .Values.provider.image.repository }}yes{{ end }}
{{- end }}

{{/* Components that export metrics, and the port of each. */}}
{{- define "gateway.metricsPorts" -}}
gateway: 8082
{{- if include "gateway.hasWorker" . }}
queue-worker: 8083
{{- end }}
{{- end }}

{{/* The rules for a scrape interval: (list $ "15s"). The alert that scales functions uses a window of four intervals:
     otherwise one late scrape would resolve the alert and scale the function down under load. */}}
{{- define "gateway.rules" -}}
{{- $window := max 30 (mul 4 (index . 1 | trimSuffix "s" | int)) -}}
{{ (index . 0).Files.Get "rules/gateway.yml" | replace "[30s]" (printf "[%ds]" $window) }}
{{- end }}

{{/* The Secret with user and password of NATS, if authentication is enabled. */}}
{{- define "gateway.natsSecret" -}}
{{- with .Values.queue }}
{{- if and (eq .backend "jetstream") .jetstream.auth.enabled }}
{{- .jetstream.auth.existingSecret | default "nats-auth" }}
{{- else if eq .backend "external" }}
{{- .external.existingSecret }}
{{- end }}
{{- end }}
{{- end }}

{{/* Settings of the queue, shared by gateway and worker. */}}
{{- define "gateway.queueSettings" -}}
{{- $queue := .Values.queue }}
faas_nats_channel: {{ $queue.channel }}
ack_wait: {{ $queue.ackWait }}
{{- if eq $queue.backend "jetstream" }}
queue: jetstream
faas_nats_address: nats
faas_nats_port: "4222"
nats_replicas: {{ $queue.jetstream.replicas | quote }}
{{- else if eq $queue.backend "stan" }}
queue: stan
faas_nats_address: nats
faas_nats_port: "4222"
faas_nats_cluster_name: {{ $queue.stan.clusterId }}
{{- else }}
queue: {{ $queue.external.kind }}
faas_nats_cluster_name: {{ $queue.stan.clusterId }}
faas_nats_address: {{ required "queue.external.address: where NATS is, for queue.backend=external" $queue.external.address | quote }}
nats_replicas: {{ $queue.external.replicas | quote }}
nats_tls: {{ $queue.external.tls | quote }}
{{- end }}
max_pending_calls: {{ int64 $queue.maxPendingCalls | quote }}
result_ttl: {{ $queue.resultTtl }}
{{- end }}

{{/* Settings of tracing, shared by gateway and worker. */}}
{{- define "gateway.tracing" -}}
{{- with .Values.tracing }}
{{- if .otlpEndpoint }}
otlp_endpoint: {{ .otlpEndpoint | quote }}
otlp_sampling_ratio: {{ .samplingRatio | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Environment variables of gateway or worker: (list $ settings values). Each appears once: extraEnv overrides env,
     and env overrides the chart's settings. */}}
{{- define "gateway.variables" -}}
{{- $settings := index . 1 }}
{{- $own := index . 2 }}
{{- with include "gateway.natsSecret" (index . 0) }}
{{- $_ := set $settings "nats_user" (dict "secretKeyRef" (dict "name" . "key" "user")) }}
{{- $_ := set $settings "nats_password" (dict "secretKeyRef" (dict "name" . "key" "password")) }}
{{- end }}
{{- include "gateway.override" (list $settings $own.env) }}
{{- range $own.extraEnv }}
{{- $_ := unset $settings .name }}
{{- end }}
{{- include "gateway.env" $settings }}
{{- with $own.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A quantity such as 8Gi, in bytes. */}}
{{- define "gateway.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "K" 1000 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "" 1 }}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | int64 }}
{{- end }}

{{/* Fails with a remedy if the volumes of an existing StatefulSet would change; Kubernetes rejects that without
     an explanation: (list $ "name" storage). */}}
{{- define "gateway.sameVolume" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $storage := index . 2 }}
{{- $live := lookup "apps/v1" "StatefulSet" $root.Release.Namespace $name | default dict }}
{{- range dig "spec" "volumeClaimTemplates" list $live }}
{{- $size := .spec.resources.requests.storage }}
{{- $class := .spec.storageClassName | default "" }}
{{- if ne (include "gateway.bytes" $size) (include "gateway.bytes" $storage.size) }}
{{- fail (printf "StatefulSet %s has volumes of %s, and cannot be given others: see \"A larger disk\" in docs/OPERATE.md" $name $size) }}
{{- else if ne $class $storage.className }}
{{- fail (printf "StatefulSet %s has volumes of the class %q, and cannot be given others: see \"A larger disk\" in docs/OPERATE.md" $name $class) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A duration such as 1m30s in whole seconds, rounded up. */}}
{{- define "gateway.seconds" -}}
{{- $units := dict "h" 3600 "m" 60 "s" 1 "ms" 0.001 "us" 0.000001 "µs" 0.000001 "ns" 0.000000001 "" 1 }}
{{- $sum := 0.0 }}
{{- range regexFindAll "[0-9.]+[a-zµ]*" . -1 }}
{{- $sum = addf $sum (mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-zµ]*$" .))) }}
{{- end }}
{{- ceil $sum | int64 }}
{{- end }}

{{/* The longest time in seconds that the gateway spends on a call: cold start, upstream timeout, and a margin. */}}
{{- define "gateway.longestCall" -}}
{{- $start := .Values.gateway.scaleFromZero | ternary (get .Values.gateway.env "cold_start_timeout" | default "60s") "0s" }}
{{- add (include "gateway.seconds" .Values.gateway.upstreamTimeout) (include "gateway.seconds" (toString $start)) 5 }}
{{- end }}

{{/* envFrom and volume mounts of a gateway or worker container: (list $ values). */}}
{{- define "gateway.files" -}}
{{- $own := index . 1 }}
{{- with $own.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $auth := (index . 0).Values.basicAuth.enabled }}
{{- if or $auth $own.extraVolumeMounts }}
volumeMounts:
  {{- if $auth }}
  - name: auth
    mountPath: /var/secrets/gateway
    readOnly: true
  {{- end }}
  {{- with $own.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The volumes for these mounts. */}}
{{- define "gateway.volumes" -}}
{{- $root := index . 0 }}
{{- if $root.Values.basicAuth.enabled }}
- name: auth
  secret:
    secretName: {{ include "gateway.authSecret" $root }}
{{- end }}
{{- with (index . 1).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
