#!/bin/sh
# The run. A pod that takes the place of an earlier one of the same Job goes on with its run.
set -eu

run="/runs/${RUN:-$JOB_UID}"
resume=''
if [ -e "$run/config.json" ]; then
  resume=--resume
fi
# FLAGS are several words, and so many are meant. A run that goes on has its experiment's flags.
# shellcheck disable=SC2086
exec python -m pipelines.run --runner=DaskRunner --dask_client_address="$SCHEDULER" \
  --run_dir="$run" --parameter_addresses="$PARAMETER_ADDRESSES" \
  --replay_addresses="$REPLAY_ADDRESSES" $FLAGS $resume
