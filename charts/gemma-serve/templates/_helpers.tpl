{{/* Names, labels, and what follows from the settings: every number that two objects share is made here. */}}

{{- define "gemma.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "gemma.fullname" -}}
{{- $name := include "gemma.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "gemma.selector" -}}
app.kubernetes.io/name: {{ include "gemma.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Not the Service's name: the LeaderWorkerSet's controller makes a headless one of the set's own name. */}}
{{- define "gemma.workload" -}}
{{- include "gemma.fullname" . -}}{{- if .Values.multiNode.enabled -}}-engine{{- end -}}
{{- end -}}

{{- define "gemma.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "gemma.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* The pods that answer requests; a LeaderWorkerSet has others too. */}}
{{- define "gemma.servers" -}}
{{ include "gemma.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "gemma.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "gemma.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "gemma.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-cpu" "" (eq .Values.device "cpu"))) -}}
{{- .Values.image.repository -}}{{- if .Values.image.digest -}}@{{ .Values.image.digest }}{{- else -}}:{{ $tag }}{{- end -}}
{{- end -}}

{{/* The settings file: the preset, and `config` over it. */}}
{{- define "gemma.config" -}}
{{- $preset := dict -}}
{{- if .Values.preset -}}
{{- $file := printf "configs/%s.yaml" .Values.preset -}}
{{- $text := .Files.Get $file -}}
{{- if not $text -}}
{{- $known := list -}}
{{- range $path, $_ := .Files.Glob "configs/*.yaml" -}}
{{- $known = append $known (base $path | trimSuffix ".yaml") -}}
{{- end -}}
{{- fail (printf "preset: there is no %q; the presets are %s" .Values.preset (join ", " $known)) -}}
{{- end -}}
{{- $preset = fromYaml $text -}}
{{- end -}}
{{- $config := mergeOverwrite $preset (deepCopy .Values.config) -}}
{{- if and .Values.multiNode.enabled (not (hasKey ($config.engine | default dict) "nnodes")) -}}
{{- $_ := set $config "engine" (merge (dict "nnodes" (int .Values.multiNode.nodes)) ($config.engine | default dict)) -}}
{{- end -}}
{{- if .Values.tls.existingSecret -}}
{{- $files := dict "tls_certificate" (printf "%s/tls.crt" (include "gemma.tlsPath" .)) "tls_private_key" (printf "%s/tls.key" (include "gemma.tlsPath" .)) -}}
{{- $_ := set $config "server" (merge ($config.server | default dict) $files) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "gemma.tlsPath" -}}/etc/gemma-serve-tls{{- end -}}

{{/* "true" where a path is below a folder: (list path folder) */}}
{{- define "gemma.isBelow" -}}
{{- ternary "true" "" (hasPrefix (printf "%s/" (trimSuffix "/" (index . 1))) (printf "%s/" (trimSuffix "/" (index . 0)))) -}}
{{- end -}}

{{/* A setting: (list . "section" "field" default) */}}
{{- define "gemma.setting" -}}
{{- $config := include "gemma.config" (index . 0) | fromYaml -}}
{{- $section := get $config (index . 1) | default dict -}}
{{- if hasKey $section (index . 2) -}}{{ get $section (index . 2) | toJson | trimAll "\"" }}{{- else -}}{{ index . 3 }}{{- end -}}
{{- end -}}

{{- define "gemma.port" -}}
{{- include "gemma.setting" (list . "server" "port" 8000) -}}
{{- end -}}

{{- define "gemma.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne (include "gemma.setting" (list . "server" "tls_certificate" "")) "") -}}
{{- end -}}

{{/* How many GPUs an engine needs in all. */}}
{{- define "gemma.worldSize" -}}
{{- $engine := (include "gemma.config" . | fromYaml).engine | default dict -}}
{{- mul (int ($engine.tensor_parallel_size | default 1)) (int ($engine.pipeline_parallel_size | default 1)) (int ($engine.data_parallel_size | default 1)) -}}
{{- end -}}

{{/* The GPUs of a pod. */}}
{{- define "gemma.gpus" -}}
{{- $nodes := ternary (int .Values.multiNode.nodes) 1 .Values.multiNode.enabled -}}
{{- ternary 0 (div (include "gemma.worldSize" . | int) $nodes) (eq .Values.device "cpu") -}}
{{- end -}}

{{/* SIGKILL comes after: the pause, the drain, and 30 s in which the engine ends. */}}
{{- define "gemma.gracePeriod" -}}
{{- $delay := include "gemma.setting" (list . "server" "drain_delay_seconds" 0) | float64 | ceil | int -}}
{{- $timeout := include "gemma.setting" (list . "server" "shutdown_timeout_seconds" 30) | float64 | ceil | int -}}
{{- add (int .Values.preStopSeconds) $delay $timeout 30 -}}
{{- end -}}

{{- define "gemma.startupSeconds" -}}
{{- mul (int .Values.startupMinutes) 60 -}}
{{- end -}}

{{/* "true" where more than one server may run. */}}
{{- define "gemma.several" -}}
{{- if eq .Values.autoscaling.kind "none" -}}
{{- ternary "true" "" (gt (int .Values.replicas) 1) -}}
{{- else -}}
{{- ternary "true" "" (gt (int .Values.autoscaling.max) 1) -}}
{{- end -}}
{{- end -}}

{{- define "gemma.redis" -}}
{{- if or .Values.redis.url .Values.redis.existingSecret .Values.redis.deploy (include "gemma.setting" (list . "storage" "url" "")) -}}true{{- end -}}
{{- end -}}

{{/* Redis's own, unless a URL that the chart can read has another. */}}
{{- define "gemma.redisPort" -}}
{{- $url := .Values.redis.url | default (include "gemma.setting" (list . "storage" "url" "")) -}}
{{- regexReplaceAll "^(\\w+://([^@/]*@)?[^/?]*?(:(\\d+))?([/?].*)?)?$" $url "${4}" | default "6379" -}}
{{- end -}}

{{- define "gemma.redisHost" -}}
{{- include "gemma.fullname" . }}-redis
{{- end -}}

{{- define "gemma.hasKeys" -}}
{{- if or .Values.apiKeys.file .Values.apiKeys.existingSecret (include "gemma.setting" (list . "security" "api_keys_file" "")) -}}true{{- end -}}
{{- end -}}

{{/* Does the model come from Hugging Face? Neither a folder nor the one in the image. */}}
{{- define "gemma.model" -}}
{{- include "gemma.setting" (list . "model" "name" "google/gemma-2b-it") -}}
{{- end -}}

{{- define "gemma.fromHub" -}}
{{- $model := include "gemma.model" . -}}
{{- if and (ne $model "gemma-demo") (not (hasPrefix "/" $model)) -}}true{{- end -}}
{{- end -}}

{{- define "gemma.needsWeights" -}}
{{- if ne (include "gemma.model" .) "gemma-demo" -}}true{{- end -}}
{{- end -}}

{{/* Who puts the model onto the weights' volume: "init", "job", or nobody but the server itself. */}}
{{- define "gemma.downloader" -}}
{{- if and (include "gemma.fromHub" .) (ne .Values.weights.from "image") (ne .Values.weights.download "none") -}}{{ .Values.weights.download }}{{- end -}}
{{- end -}}

{{- define "gemma.readOnlyClaim" -}}
{{- if and (eq .Values.weights.from "persistentVolumeClaim") (eq .Values.weights.persistentVolumeClaim.accessMode "ReadOnlyMany") -}}true{{- end -}}
{{- end -}}

{{- define "gemma.readOnlyWeights" -}}
{{- if and (include "gemma.needsWeights" .) (or (eq .Values.weights.from "image") (include "gemma.readOnlyClaim" .)) -}}true{{- end -}}
{{- end -}}

{{/* Must the server itself not ask Hugging Face? */}}
{{- define "gemma.offline" -}}
{{- if or (include "gemma.downloader" .) (include "gemma.readOnlyWeights" .) -}}true{{- end -}}
{{- end -}}

{{- define "gemma.weightsClaim" -}}
{{- .Values.weights.persistentVolumeClaim.existing | default (printf "%s-weights" (include "gemma.fullname" .)) -}}
{{- end -}}

{{/* Does the chart's own Secret have anything to hold? */}}
{{- define "gemma.ownSecret" -}}
{{- if or .Values.huggingFace.token .Values.apiKeys.file .Values.redis.url -}}true{{- end -}}
{{- end -}}

{{/* Selects this release's servers in Prometheus: names of a Deployment's or LeaderWorkerSet's pods. */}}
{{- define "gemma.metricSelector" -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ include "gemma.workload" . }}-{{ ternary "[0-9]+" "[a-z0-9]+-[a-z0-9]{5}" .Values.multiNode.enabled }}"
{{- end -}}

{{/* What runs on a CPU keeps away from the GPUs' nodes. */}}
{{- define "gemma.tolerations" -}}
{{- $tolerations := list -}}
{{- range .Values.tolerations -}}
{{- if not (and (eq $.Values.device "cpu") (eq (toString .key) $.Values.gpu.resource)) -}}
{{- $tolerations = append $tolerations . -}}
{{- end -}}
{{- end -}}
{{- toYaml $tolerations -}}
{{- end -}}

{{- define "gemma.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "gemma.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
