{{/* The container of a provider in the gateway's pod. */}}
{{- define "gateway.provider" -}}
- name: provider
  image: {{ printf "%s:%s" .Values.provider.image.repository (required "provider.image.tag: which version of the provider" .Values.provider.image.tag) }}
  imagePullPolicy: {{ .Values.provider.image.pullPolicy }}
  {{- with .Values.provider.args }}
  args: {{- toYaml . | nindent 4 }}
  {{- end }}
  env:
    {{- /* A provider may apply these timeouts to a whole call; they are longer than the gateway's, which times out first. */}}
    {{- $timeout := .Values.provider.timeout | default (printf "%ds" (add (include "gateway.seconds" .Values.gateway.upstreamTimeout) 5)) }}
    {{- $own := dict
      "port" (int .Values.provider.port)
      "function_namespace" .Values.functionNamespace.name
      "profiles_namespace" .Release.Namespace
      "read_timeout" $timeout
      "write_timeout" $timeout
      "basic_auth" .Values.basicAuth.enabled
      "secret_mount_path" "/var/secrets/gateway"
      "cluster_role" .Values.provider.rbac.allNamespaces
    }}
    {{- include "gateway.override" (list $own .Values.provider.env) }}
    {{- include "gateway.env" $own | trim | nindent 4 }}
  ports:
    - name: provider
      containerPort: {{ .Values.provider.port }}
  resources: {{- toYaml .Values.provider.resources | nindent 4 }}
  securityContext: {{- include "gateway.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: token
      mountPath: /var/run/secrets/kubernetes.io/serviceaccount
      readOnly: true
    - name: provider-tmp
      mountPath: /tmp
    {{- if .Values.basicAuth.enabled }}
    - name: auth
      mountPath: /var/secrets/gateway
      readOnly: true
    {{- end }}
{{- end }}
