{{/* A pod of the server, or of a node that helps one: (dict "root" . "component" "server" | "node") */}}
{{- define "gemma.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $server := eq .component "server" -}}
{{- with $root -}}
metadata:
  labels:
    {{- include "gemma.labels" . | nindent 4 }}
    app.kubernetes.io/component: {{ $.component }}
    {{- with $values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    # Another setting or secret of the chart's is another pod. A Secret of yours is not looked into.
    checksum/config: {{ include "gemma.config" . | sha256sum }}
    checksum/secret: {{ printf "%s%s" $values.huggingFace.token $values.redis.url | sha256sum }}
    {{- with $values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "gemma.serviceAccount" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false  # a Service called gemma-server would set GEMMA_SERVER_PORT
  terminationGracePeriodSeconds: {{ include "gemma.gracePeriod" . }}
  securityContext:
    {{- include "gemma.podSecurity" . | nindent 4 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with include "gemma.downloader" . }}
  initContainers:
    - {{- include "gemma.download" (dict "root" $root "wait" (eq . "job")) | nindent 6 }}
  {{- end }}
  containers:
    - name: server
      image: {{ include "gemma.image" . }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args: [{{ ternary "serve" "node" $server }}, --config, /etc/gemma-serve/config.yaml]
      env:
        {{- include "gemma.env" . | nindent 8 }}
        {{- include "gemma.secretEnv" . | nindent 8 }}
        {{- if $values.multiNode.enabled }}
        # LWS_LEADER_ADDRESS and LWS_WORKER_INDEX are put before these by the LeaderWorkerSet's controller.
        - {name: GEMMA_ENGINE_MASTER_ADDR, value: $(LWS_LEADER_ADDRESS)}
        - {name: GEMMA_ENGINE_NODE_RANK, value: $(LWS_WORKER_INDEX)}
        {{- end }}
        {{- with $values.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- if $server }}
      ports:
        - {name: http, containerPort: {{ include "gemma.port" . }}}
      startupProbe:
        httpGet: {path: /health/ready, port: http, scheme: {{ include "gemma.scheme" . }}}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (include "gemma.startupSeconds" . | int) 5 }}
      readinessProbe:
        httpGet: {path: /health/ready, port: http, scheme: {{ include "gemma.scheme" . }}}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /health/live, port: http, scheme: {{ include "gemma.scheme" . }}}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      {{- end }}
      {{- if $values.preStopSeconds }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ $values.preStopSeconds | quote }}]}
      {{- end }}
      securityContext:
        {{- include "gemma.containerSecurity" . | nindent 8 }}
      resources:
        {{- $resources := deepCopy $values.resources }}
        {{- if ne $values.device "cpu" }}
        {{- $_ := set $resources "limits" (merge (dict $values.gpu.resource (include "gemma.gpus" . | int)) ($resources.limits | default dict)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/gemma-serve}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if include "gemma.needsWeights" . }}
        - {name: weights, mountPath: {{ $values.weights.mountPath }}{{ if include "gemma.readOnlyWeights" . }}, readOnly: true{{ end }}}
        {{- end }}
        {{- if or $values.apiKeys.file $values.apiKeys.existingSecret }}
        - {name: keys, mountPath: /etc/gemma-serve-keys, readOnly: true}
        {{- end }}
        {{- if $values.tls.existingSecret }}
        - {name: tls, mountPath: {{ include "gemma.tlsPath" . }}, readOnly: true}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "gemma.fullname" . }}}
    - name: cache
      emptyDir: {sizeLimit: {{ $values.compileCacheSize }}}
    - name: tmp
      emptyDir: {sizeLimit: 2Gi}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory }}}
    {{- if include "gemma.needsWeights" . }}
    {{- include "gemma.weightsVolume" . | nindent 4 }}
    {{- end }}
    {{- if or $values.apiKeys.file $values.apiKeys.existingSecret }}
    - name: keys
      secret:
        secretName: {{ $values.apiKeys.existingSecret | default (include "gemma.fullname" .) }}
        items: [{key: {{ ternary $values.apiKeys.secretKey "keys.yaml" (ne $values.apiKeys.existingSecret "") }}, path: keys.yaml}]
    {{- end }}
    {{- with $values.tls.existingSecret }}
    - name: tls
      secret: {secretName: {{ . }}}
    {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  tolerations: {{- include "gemma.tolerations" . | nindent 4 }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $server }}
  {{- with $values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "gemma.servers" $root | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Where things are written: nowhere but on volumes. */}}
{{- define "gemma.env" -}}
- {name: HOME, value: /cache}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
- {name: HF_HOME, value: {{ ternary (printf "%s/huggingface" .Values.weights.mountPath) "/cache/huggingface" (ne (include "gemma.needsWeights" .) "") }}}
{{- if include "gemma.offline" . }}
- {name: HF_HUB_OFFLINE, value: "1"}  # the weights are there
{{- end }}
{{- end -}}

{{- define "gemma.hubEnv" -}}
{{- if or .Values.huggingFace.token .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.huggingFace.existingSecret | default (include "gemma.fullname" .) }}
      key: {{ ternary .Values.huggingFace.secretKey "HF_TOKEN" (ne .Values.huggingFace.existingSecret "") }}
{{- end }}
{{- end -}}

{{- define "gemma.secretEnv" -}}
{{- if not (include "gemma.offline" .) }}
{{- include "gemma.hubEnv" . }}
{{- end }}
{{- if or .Values.apiKeys.file .Values.apiKeys.existingSecret }}
- {name: GEMMA_SECURITY_API_KEYS_FILE, value: /etc/gemma-serve-keys/keys.yaml}
{{- end }}
{{- if and (include "gemma.redis" .) (not (include "gemma.setting" (list . "storage" "prefix" ""))) }}
- {name: GEMMA_STORAGE_PREFIX, value: "{{ .Release.Namespace }}.{{ include "gemma.fullname" . }}"}
{{- end }}
{{- if .Values.redis.deploy }}
- {name: GEMMA_STORAGE_URL, value: "redis://{{ include "gemma.redisHost" . }}:6379/0"}
{{- else if or .Values.redis.url .Values.redis.existingSecret }}
- name: GEMMA_STORAGE_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret | default (include "gemma.fullname" .) }}
      key: {{ ternary .Values.redis.secretKey "redis-url" (ne .Values.redis.existingSecret "") }}
{{- end }}
{{- end -}}

{{/* A container that puts the model into the Hugging Face cache, and does nothing where it is there; or that waits until
     all of it is there: (dict "root" . "wait" true | false) */}}
{{- define "gemma.download" -}}
{{- with .root -}}
name: {{ ternary "wait" "download" $.wait }}
image: {{ include "gemma.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if $.wait }}
command: [tini, --, sh, -c, 'until HF_HUB_OFFLINE=1 hf download "$@"; do sleep 15; done', wait]
{{- else }}
command: [hf, download]
{{- end }}
args: [{{ include "gemma.model" . }}{{ with include "gemma.setting" (list . "engine" "revision" "") }}, --revision, {{ . | quote }}{{ end }}]
env:
  - {name: HOME, value: /tmp}
  - {name: HF_HOME, value: {{ .Values.weights.mountPath }}/huggingface}
  {{- if not $.wait }}
  {{- include "gemma.hubEnv" . | nindent 2 }}
  {{- end }}
  {{- with .Values.env }}{{ toYaml . | nindent 2 }}{{ end }}
securityContext:
  {{- include "gemma.containerSecurity" . | nindent 2 }}
resources:
  requests: {cpu: 500m, memory: 1Gi}
  limits: {memory: 4Gi}
volumeMounts:
  - {name: weights, mountPath: {{ .Values.weights.mountPath }}}
  - {name: tmp, mountPath: /tmp}
{{- end -}}
{{- end -}}

{{- define "gemma.weightsVolume" -}}
{{- $weights := .Values.weights -}}
- name: weights
{{- if eq $weights.from "persistentVolumeClaim" }}
  persistentVolumeClaim: {claimName: {{ include "gemma.weightsClaim" . }}{{ if include "gemma.readOnlyClaim" . }}, readOnly: true{{ end }}}
{{- else if eq $weights.from "hostPath" }}
  hostPath: {path: {{ $weights.hostPath }}, type: Directory}
{{- else if eq $weights.from "image" }}
  image: {reference: {{ $weights.image.reference }}, pullPolicy: {{ $weights.image.pullPolicy }}}
{{- else }}
  emptyDir: {sizeLimit: {{ $weights.emptyDir.size }}}
{{- end }}
{{- end -}}
