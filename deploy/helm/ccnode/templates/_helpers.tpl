{{/* The image of an agent: dict "root" $ "image" .Values.x.image */}}
{{- define "ccnode.image" -}}
{{- $name := .image.repository -}}
{{- if .root.Values.global.registry -}}{{- $name = printf "%s/%s" .root.Values.global.registry $name -}}{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default (print .root.Chart.AppVersion .root.Values.global.tagSuffix) .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "ccnode.selectorLabels" -}}
app.kubernetes.io/name: ccnode
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "ccnode.labels" -}}
{{ include "ccnode.selectorLabels" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ccnode
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* Nodes that are labelled for it */}}
{{- define "ccnode.affinity" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      {{- if .Values.nodes.workloadConfig }}
      - matchExpressions:
          - {key: nvidia.com/gpu.workload.config, operator: In, values: [vm-passthrough]}
          - {key: ccnode.dev/enabled, operator: NotIn, values: ["false"]}
      {{- end }}
      {{- if .Values.nodes.enabledLabel }}
      - matchExpressions:
          - {key: ccnode.dev/enabled, operator: In, values: ["true"]}
      {{- end }}
{{- end -}}

{{/* What all pods on nodes share: dict "root" $ "component" */}}
{{- define "ccnode.podSpec" -}}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
affinity:
  {{- include "ccnode.affinity" .root | nindent 2 }}
{{- with .root.Values.nodes.selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "ccnode.podMetadata" -}}
labels:
  {{- include "ccnode.labels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .component }}
  {{- with .root.Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "ccnode.env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: HEALTH_ADDR
  value: {{ printf "%s:%v" .Values.metrics.address .Values.metrics.port | quote }}
- name: CCNODE_MODE
  value: {{ .Values.mode }}
- name: LOG_FORMAT
  value: {{ .Values.logs.format }}
- name: LOG_LEVEL
  value: {{ .Values.logs.level | quote }}
{{- end -}}

{{- define "ccnode.probes" -}}
ports:
  - {name: metrics, containerPort: {{ .Values.metrics.port }}, protocol: TCP}
startupProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 2
  failureThreshold: 30
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 30
  timeoutSeconds: 5
  failureThreshold: 4
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end -}}

{{/* Whether nothing on the nodes is changed */}}
{{- define "ccnode.observes" -}}
{{- if eq .Values.mode "observe" }}true{{ end -}}
{{- end -}}

{{/* What the schema cannot say: every template of an agent's begins with it */}}
{{- define "ccnode.check" -}}
{{- $v := .Values -}}
{{- $prometheus := or $v.prometheus.podMonitor.enabled $v.prometheus.serviceMonitor.enabled $v.prometheus.rules.enabled -}}
{{- $beside := or $prometheus $v.grafana.enabled $v.nfd.rules $v.runtimeClasses.enabled (and $v.policies.enabled $v.policies.operator.enabled) -}}
{{- if not (or $v.ccManager.enabled $v.vfioManager.enabled $v.devicePlugin.enabled $beside) -}}
{{- fail "\n\nAll three agents are off, and nothing is on that is of use without them: enable at least one of ccManager, vfioManager and devicePlugin.\n" -}}
{{- end -}}
{{- if not (or $v.nodes.workloadConfig $v.nodes.enabledLabel) -}}
{{- fail "\n\nNo node is selected: set nodes.workloadConfig or nodes.enabledLabel to true.\n" -}}
{{- end -}}
{{- if and $v.devicePlugin.gpuAlias (eq $v.devicePlugin.gpuAlias $v.devicePlugin.nvswitchAlias) -}}
{{- fail (printf "\n\ndevicePlugin.gpuAlias and devicePlugin.nvswitchAlias are both %q: a pod could not say which it wants. Give them different names.\n" $v.devicePlugin.gpuAlias) -}}
{{- end -}}
{{- if and $v.ccManager.defaultMode (not (has $v.ccManager.defaultMode $v.ccManager.allowedModes)) -}}
{{- fail (printf "\n\nccManager.defaultMode %q is not among ccManager.allowedModes (%s).\n" $v.ccManager.defaultMode (join ", " $v.ccManager.allowedModes)) -}}
{{- end -}}
{{- if and $v.devicePlugin.enabled (not $v.ccManager.enabled) (eq $v.devicePlugin.ccGate "require") (not (include "ccnode.observes" .)) -}}
{{- fail "\n\ndevicePlugin.ccGate is require and ccManager is not enabled: no GPU would ever be offered. Enable ccManager, or set devicePlugin.ccGate: \"off\".\n" -}}
{{- end -}}
{{- if and $v.policies.enabled (semverCompare "<1.32.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "\n\nThe admission policies go by the node's name in service account tokens, which Kubernetes has since 1.32; this is %s. Set policies.enabled=false to go without them (docs/threat-model.md says what that costs).\n" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $v.policies.ppcie.enabled $v.policies.enabled (not (and $v.devicePlugin.gpuAlias $v.devicePlugin.nvswitchAlias)) -}}
{{- fail "\n\npolicies.ppcie counts the resources named by devicePlugin.gpuAlias and nvswitchAlias: name both, or set policies.ppcie.enabled=false.\n" -}}
{{- end -}}
{{- if and $v.prometheus.podMonitor.enabled $v.prometheus.serviceMonitor.enabled -}}
{{- fail "\n\nprometheus.podMonitor and prometheus.serviceMonitor find the same agents, and each would be read twice: enable one of them.\n" -}}
{{- end -}}
{{- if and $v.prometheus.rules.enabled (not $v.prometheus.rules.runbookBase) -}}
{{- fail "\n\nprometheus.rules.enabled: each alert links its runbook; set prometheus.rules.runbookBase to the address at which your people find the folder docs of this release, e.g. https://docs.example.org/ccnode.\n" -}}
{{- end -}}
{{- include "ccnode.refuseOperator" . -}}
{{- end -}}

{{/* Two agents of one kind on one node would work against each other. Without a cluster (helm template) nothing is found. */}}
{{- define "ccnode.refuseOperator" -}}
{{- $v := .Values -}}
{{- $acts := not (include "ccnode.observes" .) -}}
{{- range $policy := (lookup "nvidia.com/v1" "ClusterPolicy" "" "").items -}}
{{- $spec := $policy.spec | default dict -}}
{{- $sandbox := $spec.sandboxWorkloads | default dict -}}
{{- if $sandbox.enabled -}}
{{- $kata := eq ($sandbox.mode | default "kubevirt") "kata" -}}
{{- $both := list -}}
{{- if and $v.ccManager.enabled $kata (ne (toString (dig "ccManager" "enabled" true $spec)) "false") -}}
{{- $both = append $both "ccManager" -}}
{{- end -}}
{{- if and $acts $v.vfioManager.enabled (ne (toString (dig "vfioManager" "enabled" true $spec)) "false") -}}
{{- $both = append $both "vfioManager" -}}
{{- end -}}
{{- $theirs := ternary "kataSandboxDevicePlugin" "sandboxDevicePlugin" $kata -}}
{{- if and $acts $v.devicePlugin.enabled (ne (toString (dig $theirs "enabled" true $spec)) "false") -}}
{{- $both = append $both "devicePlugin" -}}
{{- end -}}
{{- if $both -}}
{{- fail (printf "\n\nClusterPolicy %s of the GPU Operator runs the same agents: %s. Two of a kind on one node work against each other. Disable them there, or here (--set NAME.enabled=false), or use ccnode's images in the operator instead (deploy/gpu-operator).\n" $policy.metadata.name (join ", " $both)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
