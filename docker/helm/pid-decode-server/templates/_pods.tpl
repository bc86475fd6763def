{{- define "pid.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Members of the pod specification about its environment. */}}
{{- define "pid.pod" -}}
{{- $gpu := include "pid.gpu" . | fromYaml -}}
automountServiceAccountToken: false
enableServiceLinks: false # their PID_* variables would be read as settings
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- range $name := list "serviceAccountName" "priorityClassName" "runtimeClassName" }}
{{- with get $.Values $name }}
{{ $name }}: {{ . | quote }}
{{- end }}
{{- end }}
{{- $labels := dict }}
{{- with $gpu.product }}{{ $_ := set $labels "nvidia.com/gpu.product" . }}{{ end }}
{{- with $gpu.arch }}{{ $_ := set $labels "kubernetes.io/arch" . }}{{ end }}
{{- with merge (deepCopy .Values.nodeSelector) $labels }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .Values.tolerations }}
{{- if ne .Values.gpu.type "none" }}
{{- $tolerations = prepend $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- range $name, $id := .Values.podSecurityContext }}
  {{- if not (kindIs "invalid" $id) }}
  {{ $name }}: {{ int64 $id }}
  {{- end }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch # do not change the owner of all files at every start
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Resources with GPUs added as a limit. Arguments: root, resources, count. */}}
{{- define "pid.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if ne .root.Values.gpu.type "none" }}
{{- $limits := get $resources "limits" | default dict }}
{{- $_ := set $limits .root.Values.gpu.resource (toString .count) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Defaults apply to resources that .Values.resources does not name. */}}
{{- define "pid.serverResources" -}}
{{- $cpu := "8" }}{{ $request := "16Gi" }}{{ $limit := "48Gi" }}
{{- if eq .Values.gpu.type "none" }}
{{- $cpu = "4" }}{{ $request = "8Gi" }}{{ $limit = "16Gi" }}
{{- end }}
{{- if eq (include "pid.sources" . | fromYamlArray | join "") "demo" }}
{{- $cpu = "1" }}{{ $request = "1Gi" }}{{ $limit = ternary "2Gi" $limit (eq .Values.gpu.type "none") }}
{{- end }}
{{- $requests := .Values.resources.requests | default dict | deepCopy }}
{{- $limits := .Values.resources.limits | default dict | deepCopy }}
{{- if not (or $requests.cpu $limits.cpu) }}{{ $_ := set $requests "cpu" $cpu }}{{ end }}
{{- if not (or $requests.memory $limits.memory) }}
{{- $_ := set $requests "memory" $request }}{{ $_ := set $limits "memory" $limit }}
{{- end }}
{{- include "pid.resources" (dict "root" . "resources" (dict "requests" $requests "limits" $limits) "count" .Values.gpu.count) }}
{{- end }}

{{/* A setting as text: numbers without exponent, lists with commas. */}}
{{- define "pid.text" -}}
{{- if kindIs "slice" . }}{{ join "," . }}
{{- else if kindIs "float64" . }}{{ eq (floor .) . | ternary (printf "%.0f" .) (toString .) }}
{{- else }}{{ toString . }}
{{- end }}
{{- end }}

{{/* The server's environment, as a list in the pod, so that a changed setting replaces the pods. */}}
{{- define "pid.environment" -}}
{{- $set := dict "PID_BUNDLE" (include "pid.bundles" .) }}
{{- if gt (int .Values.gpu.count) 1 }}
{{- if eq .Values.gpu.type "none" }}
{{- fail "Set gpu.type to the kind of GPU; gpu.count is more than 1." }}
{{- end }}
{{- if contains "/mig-" .Values.gpu.resource }}
{{- fail "Set gpu.count to 1: a process can use only one MIG instance. More replicas use more of them." }}
{{- end }}
{{- $devices := list }}
{{- range until (int .Values.gpu.count) }}{{ $devices = append $devices (printf "cuda:%d" .) }}{{ end }}
{{- $_ := set $set "PID_DEVICES" (join "," $devices) }}
{{- end }}
{{- if include "pid.keysSecret" . }}{{ $_ := set $set "PID_API_KEYS" "/etc/pid/keys" }}{{ end }}
{{- with .Values.captions }}
{{- if .claim }}
{{- $_ := set $set "PID_TEXT_ENCODER" (printf "/claims/%s/%s" .claim (required "Set captions.encoder to the directory of the text encoder in captions.claim." .encoder)) }}
{{- $_ := set $set "PID_CAPTION_PREFIX" (printf "/claims/%s/%s" .claim (required "Set captions.prefix to the file of the instruction text in captions.claim." .prefix)) }}
{{- $_ := set $set "PID_TEXT_ENCODER_DEVICE" .device }}
{{- if include "pid.cacheClaim" $ }}{{ $_ := set $set "PID_CAPTION_CACHE" "/cache/captions" }}{{ end }}
{{- else if or .encoder .prefix }}
{{- fail "Set captions.claim to the PersistentVolumeClaim of the text encoder." }}
{{- end }}
{{- end }}
{{- $others := dict "bundle" "bundles" "api-keys" "apiKeys" "text-encoder" "captions" "caption-prefix" "captions" "text-encoder-device" "captions" "caption-cache" "cacheClaim" "cache-dir" "cacheClaim" "port" "service.port" }}
{{- range $name, $value := .Values.settings }}
{{- if hasKey $others $name }}{{ fail (printf "settings.%s is set by the chart; use the value %s." $name (get $others $name)) }}{{ end }}
{{- if or (hasPrefix "ssl-" $name) (has $name (list "host" "uds")) }}
{{- fail (printf "settings.%s is not supported by the chart: pods serve HTTP on all addresses; let a gateway terminate TLS." $name) }}
{{- end }}
{{- $_ := set $set (printf "PID_%s" ($name | replace "-" "_" | upper)) (include "pid.text" $value) }}
{{- end }}
{{- range $name, $value := $set }}
- {name: {{ $name | quote }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}
