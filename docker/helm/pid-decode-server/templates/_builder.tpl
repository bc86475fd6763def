{{/* Members of the init container that builds a bundle. Arguments: root, name, source. */}}
{{- define "pid.builder" -}}
{{- $gpu := include "pid.gpu" .root | fromYaml }}
{{- with .source.build -}}
env:
  - {name: BUNDLE, value: {{ include "pid.bundlePath" $ | quote }}}
command: [sh, -euc]
args:
  - |
    {{- if $gpu.package }}
    found=$(python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' {{ $gpu.package }})
    if [ "$found" != {{ $gpu.version }} ]; then
      echo "This image contains {{ $gpu.package }} $found, but the chart expects {{ $gpu.version }}. Use an image and a chart of the same version." >&2
      exit 2
    fi
    {{- end }}
    mkdir -p "$(dirname "$BUNDLE")"
    exec 9> "$BUNDLE.wait"
    flock 9 # one pod builds, the others wait
    if [ -e "$BUNDLE/manifest.json" ]; then echo "$BUNDLE already exists."; exit 0; fi
    if [ -e "$BUNDLE.build/build.json" ]; then exec python build_engines.py --resume "$BUNDLE.build"; fi
    exec python build_engines.py --output "$BUNDLE" "$@"
  - build # $0
  - --decoder={{ .decoder }}
  - --target={{ $gpu.target }}
  - {{ printf "--checkpoint=/claims/%s/%s" .claim .checkpoint | quote }}
  {{- with .emptyCaption }}
  - {{ printf "--empty-caption=/claims/%s/%s" $.source.build.claim . | quote }}
  {{- end }}
  {{- range .options }}
  - {{ . | quote }}
  {{- end }}
resources:
  {{- include "pid.resources" (dict "root" $.root "resources" $.root.Values.builder.resources "count" 1) | nindent 2 }}
{{- end }}
{{- end }}
