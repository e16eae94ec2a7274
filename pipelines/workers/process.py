"""A worker process: its threads, devices and heartbeats, and the run's budget."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from infra.cores import whole_cores
from infra.process import exit_with_launcher
from pipelines.events import beat
from pipelines.experiment.config import ExperimentConfig
from pipelines.workers.hangs import progress

if TYPE_CHECKING:
    from infra.telemetry import Telemetry


STATUS_SECONDS = 2.0
"""Between two status records of a worker, which are also its heartbeats."""


def prepare_process(config: ExperimentConfig, learns: bool = True) -> None:
    """Sets the process's threads and devices and ends it with its launcher.

    Call it before any TensorFlow operation; of several workers in a process the first one decides.
    A process that does not learn sees no accelerator; one that learns, or in which learners may
    work later, allocates its memory on demand, so that learners can share an accelerator.
    """
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # On processors where TensorFlow does not enable oneDNN itself, a gradient takes two thirds of
    # the time with it (tests/benchmarks/benchmark_gradient.py).
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
    os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # another worker in this process came first
        if not learns:
            tf.config.set_visible_devices([], 'GPU')
        # With an accelerator, batches and gradients are copied during the computation.
        accelerated = bool(tf.config.get_visible_devices('GPU'))
        tf.config.threading.set_intra_op_parallelism_threads(config.run.worker_threads)
        operations = 3 if accelerated else _operations_at_once(config, learns)
        tf.config.threading.set_inter_op_parallelism_threads(operations)


def _operations_at_once(config: ExperimentConfig, learns: bool) -> int:
    """Returns how many TensorFlow operations a process computes at a time without an accelerator.

    A learner computes two if this machine has more cores than the run's learners have threads;
    other runs on the machine, actors and servers do not count. Double DQN's three forward passes,
    and a layer's gradients of weights and input, do not depend on each other (time of a gradient:
    docs/performance.md). The results stay the same to the bit.
    """
    threads = config.run.num_learners * config.run.worker_threads
    return 2 if learns and whole_cores() > threads else 1


def budget_reached(config: ExperimentConfig) -> Callable[[Any], bool]:
    """Creates a test of the parameter server's clock for the end of the run."""
    limit = config.max_agent_steps
    return lambda clock: clock.stopping or clock.agent_steps >= limit


class Status:
    """Reports a worker's heartbeat and figures every few seconds."""

    def __init__(self, telemetry: 'Telemetry', kind: str):
        self._telemetry = telemetry
        self._kind = kind
        self._due = 0.0

    def report(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records a heartbeat and `describe()` when they are due; the worker has come further."""
        progress()
        now = time.monotonic()
        if now >= self._due:
            self._due = now + STATUS_SECONDS
            beat(self._telemetry)
            self.report_now(describe)

    def report_now(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records `describe()`, due or not."""
        self._telemetry.record(self._kind, **describe())
