#!/bin/sh
# Puts all nodes with a cc-manager, the chart's or the GPU Operator's, into a mode, one after the other; the first that does not
# get there ends it. Pods that have GPUs are not evicted: such a node waits (ccnode drain-holders NODE).
#   mode-of-a-cluster.sh on|off|devtools|ppcie
set -eu
[ $# -eq 1 ] || { echo "usage: $0 on|off|devtools|ppcie" >&2; exit 2; }
here=$(dirname "$0")
nodes_of() { kubectl get pods --all-namespaces -l "$1" -o 'jsonpath={range .items[*]}{.spec.nodeName}{"\n"}{end}'; }
nodes=$(nodes_of app.kubernetes.io/name=ccnode,app.kubernetes.io/component=cc-manager && nodes_of name=nvidia-cc-manager) \
  || { echo "the pods of cc-manager cannot be listed" >&2; exit 1; }
nodes=$(printf '%s\n' "$nodes" | sort -u | sed '/^$/d')
[ -n "$nodes" ] || { echo "no node runs a cc-manager" >&2; exit 1; }
for node in $nodes; do
  "$here/mode-of-a-node.sh" "$node" "$1"
done
