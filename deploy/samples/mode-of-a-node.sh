#!/bin/sh
# Puts one node's GPUs into a mode, and waits until the node says so.
#   mode-of-a-node.sh NODE on|off|devtools|ppcie
# Needs the right to patch nodes, and membership in a group of the chart's policies.modeGroups.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 NODE on|off|devtools|ppcie" >&2; exit 2; }
kubectl label --overwrite node "$1" "nvidia.com/cc.mode=$2"
kubectl wait --timeout=15m "node/$1" --for="jsonpath={.metadata.labels.nvidia\.com/cc\.mode\.state}=$2"
