{{/* Public paths by type: all except /health and /metrics. */}}
{{- define "pid.publicPaths" -}}
Exact: [/, /info, /version, /openapi.json]
Prefix: [/decode, /remote-decode, /v2, /docs, /playground]
{{- end }}
