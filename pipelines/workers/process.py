"""A worker process: its threads, its device, its signs of life and the budget of its run."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from infra.process import exit_with_launcher
from pipelines.events import beat
from pipelines.experiment.config import ExperimentConfig

if TYPE_CHECKING:
    from infra.telemetry import Telemetry


STATUS_SECONDS = 2.0
"""Between two status records of a worker, which are its heartbeat too."""


def prepare_process(config: ExperimentConfig, learns: bool = True) -> None:
    """Bounds this worker process's threads and life; call it before any TensorFlow operation.

    A process that does not learn sees no accelerator; one that does takes memory of it as it needs
    more, so that several learners may share one.
    """
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # oneDNN's kernels: a gradient takes two thirds of the time on processors where TensorFlow does
    # not switch them on by itself (tests/benchmarks/benchmark_gradient.py).
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
    os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # another worker in this process was first
        if not learns:
            tf.config.set_visible_devices([], 'GPU')
        accelerated = bool(tf.config.get_visible_devices('GPU'))
        tf.config.threading.set_intra_op_parallelism_threads(config.run.worker_threads)
        # On an accelerator a batch and a gradient travel beside the computation.
        tf.config.threading.set_inter_op_parallelism_threads(3 if accelerated else 1)


def budget_reached(config: ExperimentConfig) -> Callable[[Any], bool]:
    """A test of the parameter server's clock: is the run over?"""
    limit = config.max_agent_steps
    return lambda clock: clock.stopping or clock.agent_steps >= limit


class Status:
    """Tells the monitor, every few seconds, that a worker lives and what it does."""

    def __init__(self, telemetry: 'Telemetry', kind: str):
        self._telemetry = telemetry
        self._kind = kind
        self._due = 0.0

    def tell(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records a heartbeat and `describe()` when they are due."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + STATUS_SECONDS
            beat(self._telemetry)
            self.tell_now(describe)

    def tell_now(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records `describe()`, due or not."""
        self._telemetry.record(self._kind, **describe())
