{{/* What no schema can say: values that contradict each other. Each sentence says what to do. */}}
{{- define "gemma.checks" -}}
{{- $values := .Values -}}
{{- $config := include "gemma.config" . | fromYaml -}}
{{- if hasKey $config "Error" -}}
{{- fail (printf "config: %s" $config.Error) -}}
{{- end -}}

{{- if eq $values.image.tag "latest" -}}
{{- fail "image.tag: `latest` is another server tomorrow; name a version, or leave it empty for the chart's own" -}}
{{- end -}}

{{- range $values.env -}}
{{- if hasPrefix "GEMMA_" (toString .name) -}}
{{- fail (printf "env: %s would go past the checks of this chart; settings go below config, secrets into apiKeys, redis, huggingFace or tls" .name) -}}
{{- end -}}
{{- end -}}
{{- if $config.models -}}
{{- fail "config.models: use a release for each model, so that each has its weights and its GPUs" -}}
{{- end -}}

{{- $world := include "gemma.worldSize" . | int -}}
{{- $engine := $config.engine | default dict -}}
{{- $sizes := printf "tensor_parallel_size %d × pipeline_parallel_size %d × data_parallel_size %d" (int ($engine.tensor_parallel_size | default 1)) (int ($engine.pipeline_parallel_size | default 1)) (int ($engine.data_parallel_size | default 1)) -}}
{{- if $values.multiNode.enabled -}}
{{- $nodes := int $values.multiNode.nodes -}}
{{- if mod $world $nodes -}}
{{- fail (printf "multiNode.nodes: %d GPUs (%s) cannot be spread over %d nodes evenly" $world $sizes $nodes) -}}
{{- end -}}
{{- if gt (int ($engine.data_parallel_size | default 1)) 1 -}}
{{- fail "config.engine.data_parallel_size: not with multiNode; set replicas for more engines" -}}
{{- end -}}
{{- if ne (int ($engine.nnodes | default $nodes)) $nodes -}}
{{- fail (printf "config.engine.nnodes: is %d, multiNode.nodes is %d; leave it out" (int $engine.nnodes) $nodes) -}}
{{- end -}}
{{- else if gt (int ($engine.nnodes | default 1)) 1 -}}
{{- fail "config.engine.nnodes: set multiNode.enabled and multiNode.nodes" -}}
{{- end -}}

{{- $gpus := include "gemma.gpus" . | int -}}
{{- if eq $values.device "cpu" -}}
{{- if $values.gpu.count -}}
{{- fail (printf "gpu.count: is %d, but device is cpu" (int $values.gpu.count)) -}}
{{- end -}}
{{- if eq (toString ($config.performance | default dict).device) "cuda" -}}
{{- fail "device: is cpu, but the preset or config.performance.device says cuda" -}}
{{- end -}}
{{- else if and (not (kindIs "invalid" $values.gpu.count)) (ne (int $values.gpu.count) $gpus) -}}
{{- fail (printf "gpu.count: is %d, but the engine needs %d GPUs in each pod (%s); leave it out" (int $values.gpu.count) $gpus $sizes) -}}
{{- end -}}

{{- if and (ne $values.autoscaling.kind "none") (gt (int $values.autoscaling.min) (int $values.autoscaling.max)) -}}
{{- fail (printf "autoscaling.min: %d is more than autoscaling.max, %d" (int $values.autoscaling.min) (int $values.autoscaling.max)) -}}
{{- end -}}

{{- $several := or (include "gemma.several" .) $values.multiNode.enabled -}}
{{- $weights := $values.weights -}}
{{- if include "gemma.needsWeights" . -}}
{{- if and (eq $weights.from "hostPath") (not $weights.hostPath) -}}
{{- fail "weights.hostPath: no storage for the weights; name a folder of the nodes" -}}
{{- end -}}
{{- if and (eq $weights.from "image") (not $weights.image.reference) -}}
{{- fail "weights.image.reference: no storage for the weights; name an image that holds them" -}}
{{- end -}}
{{- if and (eq $weights.from "persistentVolumeClaim") $several (hasPrefix "ReadWriteOnce" $weights.persistentVolumeClaim.accessMode) -}}
{{- fail (printf "weights.persistentVolumeClaim.accessMode: several pods on different nodes cannot share a %s volume; use ReadWriteMany, hostPath or image" $weights.persistentVolumeClaim.accessMode) -}}
{{- end -}}
{{- if include "gemma.readOnlyClaim" . -}}
{{- if not $weights.persistentVolumeClaim.existing -}}
{{- fail "weights.persistentVolumeClaim.existing: nothing could fill a ReadOnlyMany claim of the chart's; name one that holds the weights" -}}
{{- end -}}
{{- if include "gemma.downloader" . -}}
{{- fail (printf "weights.download: %s cannot write into a ReadOnlyMany volume; set it to none" $weights.download) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $weights.from "persistentVolumeClaim") (eq (include "gemma.downloader" .) "job") (hasPrefix "ReadWriteOnce" $weights.persistentVolumeClaim.accessMode) -}}
{{- fail (printf "weights.download: a job on another node than the servers cannot share their %s volume; use ReadWriteMany, or init" $weights.persistentVolumeClaim.accessMode) -}}
{{- end -}}
{{- if and (has $weights.from (list "image" "emptyDir")) (eq $weights.download "job") -}}
{{- fail (printf "weights.download: a job cannot fill a volume of the kind %s" $weights.from) -}}
{{- end -}}
{{- if and (hasPrefix "/" (include "gemma.model" .)) (not (include "gemma.isBelow" (list (include "gemma.model" .) $weights.mountPath))) -}}
{{- fail (printf "config.model.name: %s is not in weights.mountPath (%s)" (include "gemma.model" .) $weights.mountPath) -}}
{{- end -}}
{{- end -}}

{{- $security := $config.security | default dict -}}
{{- if and (include "gemma.several" .) (not (include "gemma.redis" .)) -}}
{{- $counted := "each of several servers would count for itself, so clients get a multiple of it; set redis.url, redis.existingSecret or redis.deploy" -}}
{{- range list "rate_limit_per_minute" "tokens_per_minute" "tokens_per_day" "max_in_flight" -}}
{{- if get $security . -}}
{{- fail (printf "config.security.%s: %s" . $counted) -}}
{{- end -}}
{{- end -}}
{{- $keys := get (fromYaml $values.apiKeys.file) "keys" -}}
{{- range $key := ternary $keys list (kindIs "slice" $keys) -}}
{{- range $name, $limit := ternary $key dict (kindIs "map" $key) | dig "limits" dict | default dict -}}
{{- if $limit -}}
{{- fail (printf "apiKeys.file: %s of %s: %s" $name $key.name $counted) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if gt (len (compact (list $values.redis.url $values.redis.existingSecret (ternary "deploy" "" $values.redis.deploy)))) 1 -}}
{{- fail "redis: give one of url, existingSecret and deploy" -}}
{{- end -}}
{{- if contains "@" (toString ($config.storage | default dict).url) -}}
{{- fail "config.storage.url: a ConfigMap is no place for a password; use redis.url or redis.existingSecret" -}}
{{- end -}}
{{- if $security.api_keys -}}
{{- fail "config.security.api_keys: a ConfigMap is no place for keys; use apiKeys.file, which holds digests, or apiKeys.existingSecret" -}}
{{- end -}}
{{- if and $values.apiKeys.file $values.apiKeys.existingSecret -}}
{{- fail "apiKeys: give one of file and existingSecret" -}}
{{- end -}}
{{- if and $values.huggingFace.token $values.huggingFace.existingSecret -}}
{{- fail "huggingFace: give one of token and existingSecret" -}}
{{- end -}}

{{- range $field := list "tls_certificate" "tls_private_key" -}}
{{- $path := include "gemma.setting" (list $ "server" $field "") -}}
{{- $ofSecret := and $values.tls.existingSecret (include "gemma.isBelow" (list $path (include "gemma.tlsPath" $))) -}}
{{- $ofWeights := and (include "gemma.needsWeights" $) (include "gemma.isBelow" (list $path $weights.mountPath)) -}}
{{- if and $path (not $ofSecret) (not $ofWeights) -}}
{{- fail (printf "config.server.%s: no volume of the pod holds %s; name a Secret with the certificate in tls.existingSecret" $field $path) -}}
{{- end -}}
{{- end -}}

{{- $open := or (has "/metrics" ($security.public_paths | default list)) (eq (toString $security.api_key_required) "false") -}}
{{- if and (ne $values.monitoring.kind "none") (include "gemma.hasKeys" .) (not $values.monitoring.keySecret) (not $open) -}}
{{- fail "monitoring.keySecret: /metrics needs a key of scope `metrics` once there are API keys; name a Secret with one" -}}
{{- end -}}

{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.hosts: name at least one host" -}}
{{- end -}}
{{- if and $values.gateway.enabled (not $values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs: name the Gateway that the route is for" -}}
{{- end -}}
{{- if and (or $values.ingress.enabled $values.gateway.enabled) (not $security.trusted_proxies) -}}
{{- fail "config.security.trusted_proxies: behind an Ingress or a Gateway all clients have its address, so they share limits and cached answers, and 20 wrong keys of one block all; give the network of its pods, such as [10.0.0.0/8]" -}}
{{- end -}}
{{- end -}}
