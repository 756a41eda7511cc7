{{- /* Where the agent listens: with a PodMonitor on every address, as Prometheus comes from another node. */ -}}
{{- define "drawbridge.metricsAddress" -}}
{{- if .Values.podMonitor.enabled -}}
[::]:{{ include "drawbridge.metricsPort" . }}
{{- else -}}
{{ .Values.config.metricsAddress }}
{{- end -}}
{{- end -}}

{{- define "drawbridge.metricsPort" -}}
{{ regexFind "[0-9]+$" .Values.config.metricsAddress }}
{{- end -}}

{{- /* Where the kubelet asks. */ -}}
{{- define "drawbridge.probeHost" -}}
{{- $host := regexReplaceAll ":[0-9]+$" (include "drawbridge.metricsAddress" .) "" | trimPrefix "[" | trimSuffix "]" -}}
{{ has $host (list "0.0.0.0" "::") | ternary "127.0.0.1" $host }}
{{- end -}}

{{- /* The file config.yaml. */ -}}
{{- define "drawbridge.config" -}}
# The agent's configuration; docs/configuration.md has every key. What is left out has its default.
{{ merge (dict "metricsAddress" (include "drawbridge.metricsAddress" .)) .Values.config | toYaml }}
{{ end -}}

{{- /* Another configuration has another name, so that it rolls out node by node. */ -}}
{{- define "drawbridge.configName" -}}
drawbridge-config-{{ include "drawbridge.config" . | sha256sum | trunc 10 }}
{{- end -}}
