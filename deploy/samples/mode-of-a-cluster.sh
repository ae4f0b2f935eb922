#!/bin/sh
# Puts all nodes with ccnode into a mode, one after the other; the first that does not get there ends it. Pods that have GPUs are
# not evicted: such a node waits (ccnode drain-holders NODE).
#   mode-of-a-cluster.sh on|off|devtools|ppcie
set -eu
[ $# -eq 1 ] || { echo "usage: $0 on|off|devtools|ppcie" >&2; exit 2; }
here=$(dirname "$0")
nodes=$(kubectl get pods --all-namespaces -l app.kubernetes.io/name=ccnode,app.kubernetes.io/component=cc-manager \
  -o 'jsonpath={range .items[*]}{.spec.nodeName}{"\n"}{end}' | sort -u)
[ -n "$nodes" ] || { echo "no node runs ccnode's cc-manager" >&2; exit 1; }
for node in $nodes; do
  "$here/mode-of-a-node.sh" "$node" "$1"
done
