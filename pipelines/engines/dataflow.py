"""Dataflow: one job's flags from the run's, and the end of a job that is not to go on.

In: which workers a job has and the user's flags. Out: flags that give each worker a process of its
own on machines of a fixed number; what becomes of a job; requests to cancel or drain.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    WorkerOptions,
)

DRAIN_SECONDS = 30.0
"""A streaming job that has not drained within is cancelled."""

_POLL_SECONDS = 2.0
_FOLLOW_SECONDS = 10.0
_CONSOLE = 'https://console.cloud.google.com/dataflow/jobs'
_ENDED = {f'JOB_STATE_{state}' for state in ('DONE', 'FAILED', 'CANCELLED', 'UPDATED', 'DRAINED')}
_PROCESSORS = re.compile(r'-(\d+)(?=-|$)')


def job_flags(kind: str, num_workers: int, flags: Sequence[str]) -> list[str]:
    """Flags of a job; the user's own, behind them, count where both give one.

    Dataflow starts a process for each virtual processor of a machine; with one thread a process no
    two workers of ours share one. A machine with an accelerator gets one process, for one learner,
    unless Nvidia's MPS lets several share it.
    """
    options = PipelineOptions(list(flags))
    service = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    accelerator = next((each for each in service if 'worker_accelerator' in each), '')
    accelerated = bool(accelerator) and 'use_nvidia_mps' not in accelerator
    machine_type = options.view_as(WorkerOptions).machine_type
    per_machine = 1 if accelerated else processors(machine_type)
    machines = math.ceil(num_workers / per_machine)
    return [
        f'--num_workers={machines}',
        f'--max_num_workers={machines}',
        '--autoscaling_algorithm=NONE',
        '--number_of_worker_harness_threads=1',
        *(['--experiments=no_use_multiple_sdk_containers'] if accelerated else []),
        '--sdk_location=container',  # the image has Beam, and this project
        '--no_save_main_session',
        f'--labels=gorila={kind}',
    ]


def processors(machine_type: str | None) -> int:
    """Virtual processors of a machine type, such as 4 of n2-standard-4; 1 if it does not say."""
    match = _PROCESSORS.search(machine_type or '')
    return max(1, int(match[1])) if match else 1


def end(result: Any, options: Any) -> None:
    """Drains a streaming job, and cancels it if that takes long; cancels a batch job at once.

    Its workers may be beyond help, their servers gone: then a drain would wait for them for ever.
    """
    from apache_beam.runners.dataflow.internal import apiclient

    # Of its own: the result's client is in use by the thread that follows the job.
    client, job = apiclient.DataflowApplicationClient(options), result.job_id()
    if options.view_as(StandardOptions).streaming:
        client.modify_job_state(job, 'JOB_STATE_DRAINING')
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and not _has_ended(client, job):
            time.sleep(_POLL_SECONDS)
    if not _has_ended(client, job):
        client.modify_job_state(job, 'JOB_STATE_CANCELLED')


def follow(result: Any, options: Any, tell: Callable[[str], None]) -> None:
    """Tells where the job can be seen, and its state whenever that changes, until it has ended.

    For a thread of its own; an answer that does not come is asked for again.
    """
    from apache_beam.runners.dataflow.internal import apiclient

    google, job = options.view_as(GoogleCloudOptions), result.job_id()
    page = f'{_CONSOLE}/{google.region}/{job}?project={google.project}'
    client, state = apiclient.DataflowApplicationClient(options), ''
    while state not in _ENDED:
        with contextlib.suppress(Exception):  # whatever the network brings: nothing depends on it
            before, state = state, str(client.get_job(job).currentState)
            if state != before:
                tell(f'{state.removeprefix("JOB_STATE_").lower()}, {page}')
        time.sleep(_FOLLOW_SECONDS)


def _has_ended(client: Any, job: str) -> bool:
    return str(client.get_job(job).currentState) in _ENDED
