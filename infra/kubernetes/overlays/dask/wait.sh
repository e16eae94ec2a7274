#!/bin/sh
# Waits until every shard answers and every worker has joined: a run checks them only once.
set -eu

seconds=900
python -m infra.probe parameter "$PARAMETER_ADDRESSES" --wait_seconds="$seconds"
python -m infra.probe replay "$REPLAY_ADDRESSES" --wait_seconds="$seconds"
exec python - "$SCHEDULER" "$WORKERS" "$seconds" << 'END'
import sys

import distributed

scheduler, workers, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with distributed.Client(scheduler, timeout=seconds) as client:
    client.wait_for_workers(workers, timeout=seconds)
    print(f'{workers} workers at {scheduler}')
END
