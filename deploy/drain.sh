#!/bin/bash
# Run by Kubernetes in a worker before the worker is stopped: drain.sh SECONDS.
#
# Ray Serve hears that this node is going, starts replicas elsewhere, and stops those here. A node with nothing left on
# it ends by itself, and this with it; after SECONDS it ends anyway.
set -u
seconds=${1:?drain.sh SECONDS}

ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being deleted" \
    --deadline-remaining-seconds "$seconds" || exit 0 # the head is gone, and with it whoever could take over

for ((waited = 0; waited < seconds; waited++)); do
    pgrep -x raylet > /dev/null || exit 0
    sleep 1
done
