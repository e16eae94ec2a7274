#!/bin/sh
# Starts the run, or resumes it in a pod that replaces an earlier one of the same Job.
set -eu

run="/runs/${RUN:-$JOB_UID}"
resume=''
if [ -e "$run/config.json" ]; then
  resume=--resume
fi
# FLAGS is split into words on purpose. A resumed run has the flags of its experiment.
# shellcheck disable=SC2086
exec python -m pipelines.run --runner=DaskRunner --dask_client_address="$SCHEDULER" \
  --run_dir="$run" --parameter_addresses="$PARAMETER_ADDRESSES" \
  --replay_addresses="$REPLAY_ADDRESSES" $FLAGS $resume
