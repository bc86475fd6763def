{{/* The kind of GPU: its entry in files/gpus.yaml, with the labels from `gpu`. */}}
{{- define "pid.gpu" -}}
{{- $gpu := get (.Files.Get "files/gpus.yaml" | fromYaml) .Values.gpu.type }}
{{- with .Values.gpu.product }}{{ $_ := set $gpu "product" . }}{{ end }}
{{- with .Values.gpu.arch }}{{ $_ := set $gpu "arch" . }}{{ end }}
{{- toYaml $gpu }}
{{- end }}

{{/* Fail unless every bundle has exactly one source. */}}
{{- define "pid.checkBundles" -}}
{{- if not .Values.bundles }}
{{- fail "Set bundles: one decoder or more by name, each with a source, such as `--set bundles.flux.claim.name=CLAIM`. The sources are described in values.yaml." }}
{{- end }}
{{- range $name, $source := .Values.bundles }}
{{- if ne (len $source) 1 }}
{{- fail (printf "bundles.%s needs exactly one source out of demo, claim, build, image and http; it has %s." $name (keys $source | sortAlpha | join " and " | default "none")) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Path of a bundle in the containers. Arguments: root, name, source. */}}
{{- define "pid.bundlePath" -}}
{{- $gpu := include "pid.gpu" .root | fromYaml }}
{{- with .source.claim }}{{ clean (printf "/claims/%s/%s" .name (.path | default "")) }}{{ end }}
{{- with .source.image }}{{ clean (printf "/images/%s/%s" $.name (.path | default "")) }}{{ end }}
{{- with .source.build -}}
{{- /* The hash separates bundles that were built from other inputs. */ -}}
/claims/{{ include "pid.bundleClaim" $.root }}/{{ $.name }}/{{ $gpu.target }}
{{- with $gpu.package }}/{{ . }}-{{ $gpu.version }}{{ end }}-{{ toJson . | sha256sum | trunc 8 }}
{{- end }}
{{- if or .source.demo .source.http }}/bundles/{{ .name }}{{ end }}
{{- end }}

{{/* Value of PID_BUNDLE: NAME=DIR, separated by commas. */}}
{{- define "pid.bundles" -}}
{{- $bundles := list }}
{{- range $name, $source := .Values.bundles }}
{{- $bundles = append $bundles (printf "%s=%s" $name (include "pid.bundlePath" (dict "root" $ "name" $name "source" $source))) }}
{{- end }}
{{- join "," $bundles }}
{{- end }}

{{/* Claims with bundles, checkpoints and text encoders: one that occurs twice must be mounted only once. */}}
{{- define "pid.readClaims" -}}
{{- $claims := dict }}
{{- range $name, $source := .Values.bundles }}
{{- with $source.claim }}{{ $_ := set $claims .name true }}{{ end }}
{{- with $source.build }}{{ $_ := set $claims (include "pid.bundleClaim" $) true }}{{ $_ := set $claims .claim true }}{{ end }}
{{- end }}
{{- with .Values.captions.claim }}{{ $_ := set $claims . true }}{{ end }}
{{- keys $claims | sortAlpha | toYaml }}
{{- end }}

{{/* Init containers that write bundles. They do nothing, or start over, when they run again. */}}
{{- define "pid.bundleContainers" -}}
{{- range $index, $name := include "pid.writtenBundles" . | fromYamlArray }}
{{- $source := get $.Values.bundles $name }}
- name: bundle-{{ $index }}
  image: {{ include "pid.image" $ | quote }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  {{- if $source.build }}
  {{- include "pid.builder" (dict "root" $ "name" $name "source" $source) | nindent 2 }}
  {{- end }}
  {{- if $source.demo }}
  command: [python, build_engines.py, --decoder, dct-demo, --target, {{ eq $.Values.gpu.type "none" | ternary "cpu" "cuda" }}, --overwrite, --output, {{ printf "/bundles/%s" $name | quote }}]
  {{- end }}
  {{- with $source.http }}
  command: [python, fetch_bundle.py, {{ .url | default "$(URL)" | quote }}, {{ .sha256 | quote }}, {{ printf "/bundles/%s" $name | quote }}]
  {{- $variables := list }}
  {{- range $variable, $secret := dict "URL" .urlSecret "PID_FETCH_TOKEN" .tokenSecret }}
  {{- with $secret }}
  {{- $variables = append $variables (dict "name" $variable "valueFrom" (dict "secretKeyRef" .)) }}
  {{- end }}
  {{- end }}
  {{- if .caConfigMap }}{{ $variables = append $variables (dict "name" "SSL_CERT_FILE" "value" "/etc/pid-ca/ca.crt") }}{{ end }}
  {{- with concat $variables $.Values.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if not $source.build }}
  resources:
    requests: {cpu: "1", memory: 1Gi}
    limits: {memory: 2Gi}
  {{- end }}
  securityContext:
    {{- include "pid.confined" $ | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: cache, mountPath: /cache}
    {{- with $source.build }}
    {{- $output := include "pid.bundleClaim" $ }}
    {{- $claims := include "pid.readClaims" $ | fromYamlArray }}
    {{- range $number, $claim := $claims }}
    {{- if eq $claim $output }}
    - {name: claim-{{ $number }}, mountPath: {{ printf "/claims/%s" $claim | quote }}}
    {{- else if eq $claim $source.build.claim }}
    - {name: claim-{{ $number }}, mountPath: {{ printf "/claims/%s" $claim | quote }}, readOnly: true}
    {{- end }}
    {{- end }}
    {{- else }}
    - {name: bundles, mountPath: /bundles}
    {{- end }}
    {{- if dig "http" "caConfigMap" "" $source }}
    - {name: ca-{{ $index }}, mountPath: /etc/pid-ca, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}

{{/* Names of the bundles that init containers write. */}}
{{- define "pid.writtenBundles" -}}
{{- $names := list }}
{{- range $name, $source := .Values.bundles }}
{{- if or $source.demo $source.http $source.build }}{{ $names = append $names $name }}{{ end }}
{{- end }}
{{- toYaml $names }}
{{- end }}

{{/* Sources of bundles in use, such as [build, http]. */}}
{{- define "pid.sources" -}}
{{- $kinds := list }}
{{- range .Values.bundles }}{{ $kinds = concat $kinds (keys .) }}{{ end }}
{{- uniq $kinds | sortAlpha | toYaml }}
{{- end }}

{{/* Fail if pods could not be replaced, or could not mount their claims. */}}
{{- define "pid.checkUpdates" -}}
{{- $surge := not (has (toString .Values.rollingUpdate.maxSurge) (list "0" "0%")) }}
{{- if not (or $surge (not (has (toString .Values.rollingUpdate.maxUnavailable) (list "0" "0%")))) }}
{{- fail "Set rollingUpdate.maxSurge or rollingUpdate.maxUnavailable to more than 0; no pod could be replaced." }}
{{- end }}
{{- if or $surge (gt (int .Values.replicas) 1) (ne .Values.autoscaling.kind "none") }}
{{- $building := has "build" (include "pid.sources" . | fromYamlArray) }}
{{- range $name, $used := dict "cacheClaim" .Values.cacheClaim.create "bundleClaim" (and $building .Values.bundleClaim.create) }}
{{- if and $used (not (has "ReadWriteMany" (get $.Values $name).accessModes)) }}
{{- fail (printf "Set %s.accessModes to [ReadWriteMany]: several pods use the claim, also during an update unless rollingUpdate.maxSurge is 0." $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
