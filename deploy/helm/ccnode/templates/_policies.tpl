{{/* Whether labels and annotations of a node differ between old and new object in other keys than these: a CEL expression.
     dict "labels" (list) "annotations" (list) "labelPrefix" "" */}}
{{- define "ccnode.policy.variables" -}}
- name: newLabels
  expression: "has(object.metadata.labels) ? object.metadata.labels : {}"
- name: oldLabels
  expression: "oldObject != null && has(oldObject.metadata.labels) ? oldObject.metadata.labels : {}"
- name: newAnnotations
  expression: "has(object.metadata.annotations) ? object.metadata.annotations : {}"
- name: oldAnnotations
  expression: "oldObject != null && has(oldObject.metadata.annotations) ? oldObject.metadata.annotations : {}"
# Keys that were added, removed, or given another value.
- name: changedLabels
  expression: >-
    variables.newLabels.filter(key, !(key in variables.oldLabels) || variables.oldLabels[key] != variables.newLabels[key])
    + variables.oldLabels.filter(key, !(key in variables.newLabels))
- name: changedAnnotations
  expression: >-
    variables.newAnnotations.filter(key, !(key in variables.oldAnnotations) || variables.oldAnnotations[key] != variables.newAnnotations[key])
    + variables.oldAnnotations.filter(key, !(key in variables.newAnnotations))
{{- end -}}

{{/* A CEL list of texts */}}
{{- define "ccnode.policy.list" -}}
[{{ range $i, $item := . }}{{ if $i }}, {{ end }}'{{ $item }}'{{ end }}]
{{- end -}}

{{- define "ccnode.policy.deployLabels" -}}
{{- list "nvidia.com/gpu.deploy.vfio-manager" "nvidia.com/gpu.deploy.vgpu-manager" "nvidia.com/gpu.deploy.sandbox-validator" "nvidia.com/gpu.deploy.sandbox-device-plugin" "nvidia.com/gpu.deploy.vgpu-device-manager" "nvidia.com/gpu.deploy.kata-sandbox-device-plugin" | toJson -}}
{{- end -}}

{{/* An agent changes its own node alone, and there its own keys.
     dict "name" "labels" (of the object) "users" (list) "keys" (list of label keys) "prefix" (of label keys, or "") "annotations" (list) */}}
{{- define "ccnode.policy.ownNode" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: {{ .name }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
      - apiGroups: [""]
        apiVersions: [v1]
        operations: [CREATE, UPDATE, DELETE]
        resources: [nodes, nodes/status]
  matchConditions:
    - name: is-the-agent
      expression: "request.userInfo.username in {{ include "ccnode.policy.list" .users }}"
  variables:
    # A service account's token names the node of its pod since Kubernetes 1.32.
    - name: tokenNodes
      expression: >-
        has(request.userInfo.extra) && 'authentication.kubernetes.io/node-name' in request.userInfo.extra
        ? request.userInfo.extra['authentication.kubernetes.io/node-name'] : []
    {{- include "ccnode.policy.variables" . | nindent 4 }}
  validations:
    - expression: "request.operation == 'UPDATE' && (!has(request.subResource) || request.subResource == '')"
      message: "An agent of ccnode neither makes nor deletes nodes, and does not write their status."
      reason: Forbidden
    - expression: "variables.tokenNodes.size() == 1 && has(request.name) && variables.tokenNodes[0] == request.name"
      messageExpression: >-
        'An agent of ccnode changes its own node alone: this token is of node '
        + (variables.tokenNodes.size() == 1 ? variables.tokenNodes[0] : '(none)') + ', and not of ' + (has(request.name) ? request.name : '(new)')
      reason: Forbidden
    - expression: >-
        request.operation != 'UPDATE' || variables.changedLabels.all(key, key in {{ include "ccnode.policy.list" .keys }}
        {{- with .prefix }} || key.startsWith('{{ . }}'){{ end }})
      message: "An agent of ccnode changes no other labels than its own."
      reason: Forbidden
    - expression: "request.operation != 'UPDATE' || variables.changedAnnotations.all(key, key in {{ include "ccnode.policy.list" .annotations }})"
      message: "An agent of ccnode changes no other annotations than its own."
      reason: Forbidden
    - expression: "request.operation != 'UPDATE' || object.spec == oldObject.spec"
      message: "An agent of ccnode changes no node's spec (taints, scheduling)."
      reason: Forbidden
---
{{ include "ccnode.policy.binding" . }}
{{- end -}}

{{- define "ccnode.policy.binding" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ .name }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  policyName: {{ .name }}
  validationActions: [Deny, Audit]
{{- end -}}

{{/* Who may change which of the labels that this is all about, whoever may patch nodes.
     dict "name" "labels" "stateUsers" (list) "modeUsers" "modeGroups" "repairGroups" */}}
{{- define "ccnode.policy.keys" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: {{ .name }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
      - apiGroups: [""]
        apiVersions: [v1]
        operations: [CREATE, UPDATE]
        # The status, too: a write of it may change labels.
        resources: [nodes, nodes/status]
  variables:
    {{- include "ccnode.policy.variables" . | nindent 4 }}
    - name: groups
      expression: "has(request.userInfo.groups) ? request.userInfo.groups : []"
    - name: isKubelet
      expression: "'system:nodes' in variables.groups"
    - name: repairs
      expression: "!variables.isKubelet && variables.groups.exists(group, group in {{ include "ccnode.policy.list" .repairGroups }})"
    - name: setsModes
      expression: >-
        !variables.isKubelet && (request.userInfo.username in {{ include "ccnode.policy.list" .modeUsers }}
        || variables.groups.exists(group, group in {{ include "ccnode.policy.list" .modeGroups }}))
    - name: isCCManager
      expression: "request.userInfo.username in {{ include "ccnode.policy.list" .stateUsers }}"
  validations:
    - expression: "variables.setsModes || !('nvidia.com/cc.mode' in variables.changedLabels)"
      message: "The label nvidia.com/cc.mode is set by members of the groups {{ join ", " .modeGroups }} alone, and never by a kubelet."
      reason: Forbidden
    - expression: >-
        variables.isCCManager || variables.repairs
        || !variables.changedLabels.exists(key, key in ['nvidia.com/cc.mode.state', 'nvidia.com/cc.ready.state'])
      message: "The labels nvidia.com/cc.mode.state and nvidia.com/cc.ready.state are written by cc-manager alone."
      reason: Forbidden
    - expression: >-
        variables.isCCManager || variables.repairs
        || !variables.changedAnnotations.exists(key, key in ['ccnode.dev/cc-status', 'ccnode.dev/transition'])
      message: "The annotations ccnode.dev/cc-status and ccnode.dev/transition are written by cc-manager alone."
      reason: Forbidden
---
{{ include "ccnode.policy.binding" . }}
{{- end -}}
