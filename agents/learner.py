"""Learner: batches from the replay in, gradients to the parameter server out (paper, section 4.1).

replay -> transitions -> loss -> gradient -> outlier test -> push
                            ^                                 |
                            +------ parameters, target <------+
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from agents.config import LearnerConfig
from agents.gradient_stream import GradientStream, InTurn
from infra.parameter_server.protocol import NotInitialisedError
from infra.replay.priorities import importance_weights


class Network(Protocol):
    """What the learner needs of an agent (see agents/gradient.py)."""

    def gradient(self, transition: Any, weights: Any = None) -> tuple[Any, Any, Any]:
        """(float32 [parameters] gradient, float32 [] loss, float32 [batch_size] absolute error)."""

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""

    def set_parameters(self, *parts: Any) -> None:
        """Assigns float32 vectors that make up [parameters] to the network."""

    def set_target(self, *parts: Any) -> None:
        """Assigns float32 vectors that make up [parameters] to the target network."""


class Parameters(Protocol):
    """What the learner needs of the parameter server's client."""

    def initialise(self, values: np.ndarray) -> bool: ...

    def pull(self, agent_steps: int = 0) -> Any: ...

    def pull_target(self) -> Any: ...

    def push_async(self, gradient: np.ndarray, versions: Any, pull: bool = True) -> Future: ...


class Priorities(Protocol):
    """What the learner needs of a prioritized replay (see infra/replay/priorities.py)."""

    @property
    def dropped(self) -> int: ...

    def update(self, key: np.ndarray, shard: np.ndarray, error: np.ndarray) -> None: ...


def importance_exponent(config: LearnerConfig, updates: int) -> float:
    """Beta, linear over the global updates (Schaul et al. 2016, section 3.4)."""
    progress = min(updates / max(config.importance_updates, 1), 1.0)
    start, end = config.importance_exponent_start, config.importance_exponent_end
    return start + progress * (end - start)


@dataclasses.dataclass(frozen=True)
class LossStatistics:
    """Running mean and variance of the absolute loss, exponentially weighted, bias corrected.

    Attributes:
      mean: of the absolute loss.
      variance: of the absolute loss.
      weight: total weight of what was seen, 1 - decay^count; below 1 - 1/e the statistics are
        too young to judge by.
    """

    mean: float = 0.0
    variance: float = 0.0
    weight: float = 0.0

    def including(self, loss: float, decay: float) -> 'LossStatistics':
        """The statistics after one more loss."""
        weight = decay * self.weight + (1.0 - decay)
        rate = (1.0 - decay) / weight
        delta = abs(loss) - self.mean
        mean = self.mean + rate * delta
        variance = (1.0 - rate) * (self.variance + rate * delta * delta)
        return LossStatistics(mean, variance, weight)

    def is_outlier(self, loss: float, deviations: float) -> bool:
        """Whether `loss` lies more than `deviations` standard deviations above the mean.

        Never while fewer than about 1 / (1 - decay) losses were seen, nor when `deviations` is 0.
        """
        young = self.weight < 1.0 - math.exp(-1.0)
        if deviations == 0.0 or young or not math.isfinite(loss):
            return False  # what is not finite the shards refuse, and count
        return abs(loss) > self.mean + deviations * math.sqrt(self.variance)


@dataclasses.dataclass
class LearnerCounters:
    """What a learner did since it started, and how its latest update looked.

    Attributes:
      gradients: computed, outliers included.
      outliers: not pushed, for their loss.
      stale: refused by a shard as too old.
      invalid: refused by a shard as not finite or misshapen.
      loss: mean of the latest batch, without importance weights.
      absolute_error: of the latest batch's rows (see agents/heads.py), float32 [batch_size]; 0
        before the first.
      priorities_dropped: changes that a replay shard did not take.
    """

    gradients: int = 0
    outliers: int = 0
    stale: int = 0
    invalid: int = 0
    loss: float = 0.0
    absolute_error: Any = 0.0
    priorities_dropped: int = 0


class Learner:
    """Computes gradients and pushes them; applies none itself (paper, section 4.1).

    With `overlap_push` the push of one gradient travels while the next is computed, so a gradient
    may be one update older than without.
    """

    def __init__(
        self,
        config: LearnerConfig,
        network: Network,
        samples: Iterator[Any],
        parameters: Parameters,
        priorities: Priorities | None = None,
        stream: Callable[[Any, Iterator[Any]], GradientStream] = InTurn,
    ):
        """
        Args:
          config: batch, freshness, outlier test.
          network: the agent's gradient.
          samples: yields the replay's samples.
          parameters: a connected, initialised client.
          priorities: of the replay that the samples are from; None: it draws uniformly, and the
            network takes no weights.
          stream: how gradients follow each other: `InTurn`, or `Ahead` on an accelerator.
        """
        self._config = config
        self._priorities = priorities
        self._gradients = stream(network, samples)
        self._parameters = parameters
        self._statistics = LossStatistics()
        self._pending: Future | None = None
        self._target_versions: tuple[int, ...] | None = None
        self.counters = LearnerCounters()
        self.clock: Any = None
        self._refresh(parameters.pull())

    def update(self) -> None:
        """One batch: gradient, outlier test, push, and what the push brings back.

        Raises:
          ReplayTimeout: the replay had no batch within its bound; the learner can be asked again.
          ParameterServerUnavailable: a shard stayed away longer than the client's bound.
        """
        sample, versions, gradient, loss, absolute_error = self._gradients.next(self._weights)
        self.finish_push()
        counters = self.counters
        counters.gradients += 1
        counters.loss = float(loss)
        counters.absolute_error = absolute_error
        if self._priorities is not None:
            self._priorities.update(sample.key, sample.shard, absolute_error)
            counters.priorities_dropped = self._priorities.dropped
        due = counters.gradients % self._config.learner_pull_period == 0
        outlier = self._statistics.is_outlier(counters.loss, self._config.outlier_deviations)
        if math.isfinite(counters.loss):
            self._statistics = self._statistics.including(counters.loss, self._config.outlier_decay)
        if outlier:
            counters.outliers += 1
            if due:
                self._refresh(self._parameters.pull())
            return
        self._pending = self._parameters.push_async(gradient, versions, pull=due)
        if not self._config.overlap_push:
            self.finish_push()

    def _weights(self, sample: Any) -> np.ndarray | None:
        """Importance weights float32 [batch_size] of a prioritized sample, else None."""
        if self._priorities is None:
            return None
        exponent = importance_exponent(self._config, self.clock.updates)
        return importance_weights(sample.probability, sample.shard, exponent)

    def look(self) -> Any:
        """Asks the parameter server for parameters and clock without a push; returns the clock."""
        self.finish_push()
        self._refresh(self._parameters.pull())
        return self.clock

    def close(self) -> None:
        """Ends what is under way; call it before replay and parameter client are closed."""
        self._gradients.close()
        self.finish_push()

    def finish_push(self) -> None:
        """Waits for the push under way and takes what it brings: verdict, parameters, target."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            reply = pending.result()
        except NotInitialisedError:
            # A shard came back without a checkpoint: what this learner has is the best there is.
            self._parameters.initialise(self._gradients.parameters())
            self._refresh(self._parameters.pull())
            return
        if 'stale' in reply.rejected:
            self.counters.stale += 1
        elif 'invalid' in reply.rejected:
            self.counters.invalid += 1
        self._refresh(reply.snapshot)
        if any(reply.rejected):
            self._refresh(self._parameters.pull())  # the next gradient must not be refused too

    def _refresh(self, snapshot: Any) -> None:
        self.clock = snapshot.clock
        if snapshot.parts is not None:
            self._gradients.set_parameters(snapshot.parts, snapshot.versions)
        if snapshot.target_versions != self._target_versions:
            target = self._parameters.pull_target()
            if target.parts is not None:
                self._gradients.set_target(target.parts)
            self._target_versions = target.target_versions
