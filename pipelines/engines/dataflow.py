"""Dataflow: a job's workers and the user's flags in, the job's flags, state changes and end out.

The flags give each worker its own process, on a fixed number of machines. Functions import Beam, so
that the names of the engines are checked without it.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

DRAIN_SECONDS = 30.0
"""After this time a draining streaming job is cancelled."""

_POLL_SECONDS = 2.0
_FOLLOW_SECONDS = 10.0
_CONSOLE = 'https://console.cloud.google.com/dataflow/jobs'
_ENDED = {f'JOB_STATE_{state}' for state in ('DONE', 'FAILED', 'CANCELLED', 'UPDATED', 'DRAINED')}
_PROCESSORS = re.compile(r'-(\d+)(?=-|$)')


def job_flags(
    kind: str, num_workers: int, flags: Sequence[str], hints: Collection[str] = ()
) -> list[str]:
    """Default flags of a job; the user's flags follow and override them.

    `hints` are the names of its resource hints. With any the service finds the machines of each
    step itself (right fitting), in a streaming job only if it also scales their number.

    Dataflow starts one process per virtual processor; with one thread per process, each of our
    workers has its own. A machine with an accelerator runs one process, for one learner, unless
    Nvidia's MPS shares the accelerator.
    """
    from apache_beam.options import pipeline_options as beam

    options = beam.PipelineOptions(list(flags))
    service = options.view_as(beam.GoogleCloudOptions).dataflow_service_options or []
    accelerator = next((each for each in service if 'worker_accelerator' in each), '')
    accelerated = 'accelerator' in hints or bool(accelerator)
    accelerated = accelerated and 'use_nvidia_mps' not in accelerator
    machine_type = options.view_as(beam.WorkerOptions).machine_type
    per_machine = 1 if accelerated else processors(machine_type)
    machines = math.ceil(num_workers / per_machine)
    scales = bool(hints) and options.view_as(beam.StandardOptions).streaming
    return [
        f'--num_workers={machines}',
        f'--max_num_workers={machines}',
        f'--autoscaling_algorithm={"THROUGHPUT_BASED" if scales else "NONE"}',
        *([f'--dataflow_service_options=min_num_workers={machines}'] * scales),
        '--number_of_worker_harness_threads=1',
        *(['--experiments=no_use_multiple_sdk_containers'] if accelerated else []),
        '--sdk_location=container',  # the image contains Beam and this project
        '--no_save_main_session',
        f'--labels=gorila={kind}',
    ]


def processors(machine_type: str | None) -> int:
    """Virtual processors of a machine type, such as 4 for n2-standard-4; 1 if its name has none."""
    match = _PROCESSORS.search(machine_type or '')
    return max(1, int(match[1])) if match else 1


def end(result: Any, options: Any) -> None:
    """Cancels a batch job; drains a streaming job for `DRAIN_SECONDS`, then cancels it.

    A drain never completes if the workers hang because their servers are gone.
    """
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.runners.dataflow.internal import apiclient

    # A new client, because the result's client is used by the thread that runs `follow`.
    client, job = apiclient.DataflowApplicationClient(options), result.job_id()
    if options.view_as(StandardOptions).streaming:
        client.modify_job_state(job, 'JOB_STATE_DRAINING')
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and not _has_ended(client, job):
            time.sleep(_POLL_SECONDS)
    if not _has_ended(client, job):
        client.modify_job_state(job, 'JOB_STATE_CANCELLED')


def follow(result: Any, options: Any, notify: Callable[[str], None]) -> None:
    """Reports each state change of the job and its console page until it has ended.

    Blocks, so run it in a thread. Failed requests are retried.
    """
    from apache_beam.options.pipeline_options import GoogleCloudOptions
    from apache_beam.runners.dataflow.internal import apiclient

    google, job = options.view_as(GoogleCloudOptions), result.job_id()
    page = f'{_CONSOLE}/{google.region}/{job}?project={google.project}'
    client, state = apiclient.DataflowApplicationClient(options), ''
    while state not in _ENDED:
        with contextlib.suppress(Exception):  # network errors: only the display depends on this
            before, state = state, str(client.get_job(job).currentState)
            if state != before:
                notify(f'{state.removeprefix("JOB_STATE_").lower()}, {page}')
        time.sleep(_FOLLOW_SECONDS)


def _has_ended(client: Any, job: str) -> bool:
    return str(client.get_job(job).currentState) in _ENDED
