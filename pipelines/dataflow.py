"""Dataflow: one job's flags from the run's, and the end of a job that is not to go on.

In: which workers a job has and the user's flags. Out: flags that give each worker a process of its
own on machines of a fixed number; requests to cancel or drain.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from infra.flags import value_of, values_of

_PROCESSORS = re.compile(r'-(\d+)(-\d+)?$')


def job_flags(kind: str, num_workers: int, flags: Sequence[str]) -> list[str]:
    """Flags of a job, of which the user's own, behind them, may override each.

    Dataflow starts a process for each virtual processor of a machine; with one thread a process no
    two workers of ours share one. A machine with an accelerator gets one process, for one learner.
    """
    options = values_of('--dataflow_service_options', flags)
    accelerated = any('worker_accelerator' in option for option in options)
    per_machine = 1 if accelerated else processors(value_of('--worker_machine_type', flags))
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
    """Virtual processors of a machine type, such as 4 of n2-standard-4 or n2-custom-4-8192."""
    match = _PROCESSORS.search(machine_type or '')
    return max(1, int(match[1])) if match else 1


def end(result: Any, options: Any) -> None:
    """Drains a streaming job and cancels a batch job, which cannot be drained."""
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.runners.dataflow.internal import apiclient

    if not options.view_as(StandardOptions).streaming:
        result.cancel()
        return
    client = apiclient.DataflowApplicationClient(options)
    client.modify_job_state(result.job_id(), 'JOB_STATE_DRAINING')
