{{/* Labels of an object: (list $ "component"). */}}
{{- define "gateway.labels" -}}
{{- $root := index . 0 -}}
{{ include "gateway.podLabels" . }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Labels of a pod: without versions, so that a new chart restarts nothing that is as before: (list $ "component"). */}}
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

{{/* What holds for every pod: user, group, and the profile of system calls. */}}
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

{{/* What holds for every container. */}}
{{- define "gateway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where pods go, and whose registries they may read. */}}
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

{{/* Replicas of a component, apart from each other: (list "component" machines), on so many machines or not at all;
     0 machines: if that can be. */}}
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

{{/* Puts what the user says over what the chart says: (list settings map). `merge` would leave out false, 0 and "". */}}
{{- define "gateway.override" -}}
{{- range $name, $value := index . 1 }}
{{- $_ := set (index $ 0) $name $value }}
{{- end }}
{{- end }}

{{/* A map of settings as a container's env, sorted by name. What is a map itself says where the value is. */}}
{{- define "gateway.env" -}}
{{- range $name, $value := . }}
{{- /* Whole numbers come as floats, and would be written as 1e+06. */}}
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

{{/* The user in it; before it is there, the one that it is made with. */}}
{{- define "gateway.authUser" -}}
{{- $name := include "gateway.authSecret" . }}
{{- $live := lookup "v1" "Secret" .Release.Namespace $name | default dict }}
{{- dig "data" "basic-auth-user" "" $live | b64dec | trim | default .Values.basicAuth.user }}
{{- end }}

{{/* Whether there is a queue, and who makes its calls: "yes" or nothing. */}}
{{- define "gateway.hasQueue" -}}
{{- if ne .Values.queue.backend "none" }}yes{{ end }}
{{- end }}
{{- define "gateway.hasWorker" -}}
{{- if and (include "gateway.hasQueue" .) (gt (int .Values.worker.replicas) 0) }}yes{{ end }}
{{- end }}
{{- define "gateway.hasProvider" -}}
{{- if .Values.provider.image.repository }}yes{{ end }}
{{- end }}

{{/* Who has numbers, and on which port. */}}
{{- define "gateway.metricsPorts" -}}
gateway: 8082
{{- if include "gateway.hasWorker" . }}
queue-worker: 8083
{{- end }}
{{- end }}

{{/* The rules, for numbers that come every so many seconds: (list $ "15s"). What scales functions looks back over four
     of them, or one that is late would end the alert, and take the replicas away in the midst of the load. */}}
{{- define "gateway.rules" -}}
{{- $window := max 30 (mul 4 (index . 1 | trimSuffix "s" | int)) -}}
{{ (index . 0).Files.Get "rules/gateway.yml" | replace "[30s]" (printf "[%ds]" $window) }}
{{- end }}

{{/* The Secret with user and password of NATS, if it asks for them. */}}
{{- define "gateway.natsSecret" -}}
{{- with .Values.queue }}
{{- if and (eq .backend "jetstream") .jetstream.auth.enabled }}
{{- .jetstream.auth.existingSecret | default "nats-auth" }}
{{- else if eq .backend "external" }}
{{- .external.existingSecret }}
{{- end }}
{{- end }}
{{- end }}

{{/* Settings of the queue, which gateway and worker share. */}}
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

{{/* Settings of tracing, which gateway and worker share. */}}
{{- define "gateway.tracing" -}}
{{- with .Values.tracing }}
{{- if .otlpEndpoint }}
otlp_endpoint: {{ .otlpEndpoint | quote }}
otlp_sampling_ratio: {{ .samplingRatio | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* The variables of gateway or worker: (list $ settings values-of-it). Each is there once: extraEnv comes before env,
     and that before the chart. */}}
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

{{/* Bytes of a quantity such as 8Gi. */}}
{{- define "gateway.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "K" 1000 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "" 1 }}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | int64 }}
{{- end }}

{{/* Says what to do where the volumes of a StatefulSet that is there would change, which Kubernetes refuses without
     saying more: (list $ "name" storage). */}}
{{- define "gateway.sameVolume" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $storage := index . 2 }}
{{- $live := lookup "apps/v1" "StatefulSet" $root.Release.Namespace $name | default dict }}
{{- range dig "spec" "volumeClaimTemplates" list $live }}
{{- $size := .spec.resources.requests.storage }}
{{- $class := .spec.storageClassName | default "" }}
{{- if ne (include "gateway.bytes" $size) (include "gateway.bytes" $storage.size) }}
{{- fail (printf "StatefulSet %s has volumes of %s, and cannot be given others: \"A larger disk\" in docs/OPERATE.md says how" $name $size) }}
{{- else if ne $class $storage.className }}
{{- fail (printf "StatefulSet %s has volumes of the class %q, and cannot be given others: see \"A larger disk\" in docs/OPERATE.md" $name $class) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whole seconds of a duration such as 1m30s, rounded up. */}}
{{- define "gateway.seconds" -}}
{{- $units := dict "h" 3600 "m" 60 "s" 1 "ms" 0.001 "us" 0.000001 "µs" 0.000001 "ns" 0.000000001 "" 1 }}
{{- $sum := 0.0 }}
{{- range regexFindAll "[0-9.]+[a-zµ]*" . -1 }}
{{- $sum = addf $sum (mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-zµ]*$" .))) }}
{{- end }}
{{- ceil $sum | int64 }}
{{- end }}

{{/* The most that the gateway may take for a call: the wait for its function, the call, and a little more. */}}
{{- define "gateway.longestCall" -}}
{{- $start := .Values.gateway.scaleFromZero | ternary (get .Values.gateway.env "cold_start_timeout" | default "60s") "0s" }}
{{- add (include "gateway.seconds" .Values.gateway.upstreamTimeout) (include "gateway.seconds" (toString $start)) 5 }}
{{- end }}

{{/* What else a container of gateway or worker reads: (list $ values-of-it). */}}
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

{{/* The volumes for it. */}}
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
