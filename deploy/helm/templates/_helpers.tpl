{{- define "hneurons.name" -}}
{{- if contains "hneurons" .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-hneurons" .Release.Name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "hneurons.selector" -}}
app.kubernetes.io/name: hneurons
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "hneurons.labels" -}}
{{ include "hneurons.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "hneurons.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-cpu" .Chart.AppVersion) }}
{{- end -}}
{{- end -}}

{{/* Flags of hneurons-serve from .Values.settings: switches, lists, plain values. */}}
{{- define "hneurons.flags" -}}
{{- range $flag, $value := .Values.settings }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $flag }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- --{{ $flag }}={{ . }}
{{- end }}
{{- else if kindIs "float64" $value }}
- --{{ $flag }}={{ if eq (floor $value) $value }}{{ int64 $value }}{{ else }}{{ $value }}{{ end }}
{{- else }}
- --{{ $flag }}={{ $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Not empty when the chart makes a cache that one node alone can mount; refused for more pods. */}}
{{- define "hneurons.cacheOfOneNode" -}}
{{- if and .Values.cache.size (not .Values.cache.existingClaim) (eq .Values.cache.accessMode "ReadWriteOnce") -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) -}}
{{- fail "cache: a ReadWriteOnce volume cannot serve several pods; set cache.accessMode ReadWriteMany or cache.existingClaim, or leave cache.size empty" -}}
{{- end -}}
true
{{- end -}}
{{- end -}}
