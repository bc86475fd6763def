{{/* Name of the objects. */}}
{{- define "pid.name" -}}
{{- .Values.fullnameOverride | default .Release.Name }}
{{- end }}

{{/* Labels of all objects. The name is fixed, because it becomes the job label in Prometheus. */}}
{{- define "pid.labels" -}}
{app.kubernetes.io/name: pid, app.kubernetes.io/instance: {{ .Release.Name | quote }}}
{{- end }}

{{/* Labels of the server pods. */}}
{{- define "pid.serverLabels" -}}
{app.kubernetes.io/name: pid, app.kubernetes.io/instance: {{ .Release.Name | quote }}, app.kubernetes.io/component: server}
{{- end }}

{{/* Labels of objects that Prometheus and Grafana select. */}}
{{- define "pid.monitoringLabels" -}}
{{- include "pid.labels" . | fromYaml | merge (deepCopy .Values.prometheus.labels) | toYaml }}
{{- end }}

{{- define "pid.image" -}}
{{- $image := .Values.image }}
{{- $name := required "Set image.repository to the name of the server's image in your registry, such as registry.example/pid-decode-server." $image.repository }}
{{- if $image.digest }}{{ $name }}@{{ $image.digest }}
{{- else }}{{ $name }}:{{ $image.tag | default (printf "%s-%s" .Chart.AppVersion (eq .Values.gpu.type "none" | ternary "cpu" "gpu")) }}
{{- end }}
{{- end }}

{{- define "pid.bundleClaim" -}}
{{- if not (or .Values.bundleClaim.create .Values.bundleClaim.name) }}
{{- fail "Set bundleClaim.name to an existing PersistentVolumeClaim, or bundleClaim.create to true." }}
{{- end }}
{{- .Values.bundleClaim.name | default (printf "%s-bundles" (include "pid.name" .)) }}
{{- end }}

{{/* Name of the claim for compiled code, or nothing. */}}
{{- define "pid.cacheClaim" -}}
{{- .Values.cacheClaim.name | default (.Values.cacheClaim.create | ternary (printf "%s-cache" (include "pid.name" .)) "") }}
{{- end }}

{{- define "pid.keysSecret" -}}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.keys }}
{{- fail "Set either apiKeys.existingSecret or apiKeys.keys, not both." }}
{{- end }}
{{- .Values.apiKeys.existingSecret | default (empty .Values.apiKeys.keys | ternary "" (printf "%s-api-keys" (include "pid.name" .))) }}
{{- end }}
