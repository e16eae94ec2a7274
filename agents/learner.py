"""Learner: batches from the replay in, gradients to the parameter server out (paper, section 4.1).

replay -> transitions -> loss -> gradient -> outlier test -> push
                            ^                                 |
                            +------ parameters, target <------+
"""

import bisect
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from agents.config import STALENESS_BOUNDS, LearnerConfig
from agents.gradient_pipeline import Computed, GradientStream, InTurn
from infra.annealing import linear
from infra.parameter_server.protocol import INVALID, STALE, NotInitialisedError
from infra.replay.priorities import importance_weights, priority_of


class Network(Protocol):
    """The part of an agent's interface that the learner uses (see agents/gradient.py)."""

    def gradient(self, transition: Any, weights: Any = None) -> tuple[Any, Any, Any, Any]:
        """Gradient float32 [parameters], loss [], absolute errors [batch_size], clip factor []."""

    def values(self, observation: Any, action: Any) -> tuple[float, float] | None:
        """Mean value of the actions taken and the largest of all; None: unknown."""

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""

    def set_parameters(self, *parts: Any) -> None:
        """Assigns float32 vectors that concatenate to [parameters] to the network."""

    def set_target(self, *parts: Any) -> None:
        """Assigns float32 vectors that concatenate to [parameters] to the target network."""


class Parameters(Protocol):
    """The part of the parameter client's interface that the learner uses."""

    def initialise(self, values: np.ndarray) -> bool: ...

    def pull(self, agent_steps: int = 0) -> Any: ...

    def pull_target(self) -> Any: ...

    def push(self, gradient: np.ndarray, version: int, pull: bool = True) -> Any: ...

    def push_async(self, gradient: np.ndarray, version: int, pull: bool = True) -> Future: ...


class Priorities(Protocol):
    """The part of a prioritized replay that the learner uses (see infra/replay/priorities.py)."""

    @property
    def dropped(self) -> int: ...

    def update(self, key: np.ndarray, shard: np.ndarray, error: np.ndarray) -> None: ...


def importance_exponent(config: LearnerConfig, updates: int) -> float:
    """Beta, annealed linearly over the global updates (Schaul et al. 2016, section 3.4)."""
    start, end = config.importance_exponent_start, config.importance_exponent_end
    return linear(start, end, updates, config.importance_updates)


@dataclasses.dataclass(frozen=True)
class LossStatistics:
    """Running mean and variance of the absolute loss, exponentially weighted, bias corrected.

    Attributes:
      mean: of the absolute loss.
      variance: of the absolute loss.
      weight: total weight of the losses seen, 1 - decay^count; below 1 - 1/e the statistics are
        too young for the outlier test.
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

    def bound(self, deviations: float) -> float:
        """The largest absolute loss that is not an outlier.

        Returns the mean plus `deviations` standard deviations. Returns infinity if `deviations` is
        0, and during the first 1 / (1 - decay) or so losses.
        """
        if deviations == 0.0 or self.weight < 1.0 - math.exp(-1.0):
            return math.inf
        return self.mean + deviations * math.sqrt(self.variance)


class OutlierTest:
    """Detects outliers among losses and decides which gradients to drop (paper, 4.1).

    A rare reward also causes outliers, and a dropped gradient does not reduce the next such loss.
    The paper's rule drops every outlier, so it can hide a rare reward for ever. The rule 'lone'
    drops an outlier only if the one before it was not dropped and lies more than 1 / (1 - decay)
    losses back. It drops a single outlier and learns from a recurring one at least every other
    time.

    An outlier enters the statistics as the bound that it exceeds. Its full size would raise the
    bound for about 1 / (1 - decay) losses and hide other outliers.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._dropped_last = False
        self._since_last = 0  # losses
        self.statistics = LossStatistics()

    def drops(self, loss: float) -> bool:
        """Adds the loss to the statistics and returns whether to drop its gradient."""
        if not math.isfinite(loss):
            return False  # the parameter server rejects and counts the non-finite gradient
        bound = self.statistics.bound(self._config.outlier_deviations)
        self.statistics = self.statistics.including(
            min(abs(loss), bound), self._config.outlier_decay
        )
        self._since_last += 1
        if abs(loss) <= bound:
            return False
        window = 1.0 / (1.0 - self._config.outlier_decay)
        lone = self._since_last > window and not self._dropped_last
        self._since_last = 0
        self._dropped_last = lone or self._config.outlier_rule == 'every'
        return self._dropped_last


@dataclasses.dataclass
class LearnerCounters:
    """Counts of a learner since its start.

    Attributes:
      gradients: gradients computed, outliers included.
      outliers: gradients dropped by the outlier test.
      stale: gradients rejected as too old.
      invalid: gradients rejected as not finite or misshapen.
      staleness: histogram of pushed gradients by staleness (see `STALENESS_BOUNDS`).
      loss: mean loss of the latest batch, without importance weights.
      loss_sum: sum of the losses of all gradients.
      priorities_dropped: priority updates that a replay shard did not accept.
    """

    gradients: int = 0
    outliers: int = 0
    stale: int = 0
    invalid: int = 0
    staleness: list[int] = dataclasses.field(
        default_factory=lambda: [0] * (len(STALENESS_BOUNDS) + 1)
    )
    loss: float = 0.0
    loss_sum: float = 0.0
    priorities_dropped: int = 0


class Learner:
    """Computes gradients and pushes them; the parameter server applies them (paper, section 4.1).

    With `overlap_push` it sends gradients while it computes the next, so a gradient may be older:
    by up to 2 k - 1 updates with k `pushes_in_flight`, since later pushes may overtake it.
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
          config: batch size, freshness of parameters, outlier test.
          network: computes the agent's gradient.
          samples: yields the replay's samples.
          parameters: a connected, initialised client.
          priorities: writer to the prioritized replay that yields the samples; None for a uniform
            replay, where the network takes no weights.
          stream: schedules the gradients: `InTurn`, or `Ahead` on an accelerator.
        """
        self._config = config
        self._priorities = priorities
        self._network = network
        self._gradients = stream(network, samples)
        self._latest: Computed | None = None
        self._parameters = parameters
        self._outlier_test = OutlierTest(config)
        self._pending: collections.deque[Future] = collections.deque()  # the oldest first
        self._target_versions: tuple[int, ...] | None = None
        self.counters = LearnerCounters()
        self.clock: Any = None
        self._refresh(parameters.pull())

    def update(self) -> None:
        """Processes one batch: computes its gradient, tests for an outlier and pushes.

        Raises:
          ReplayTimeout: the replay has no batch within its bound; the caller may call again.
          ParameterServerUnavailable: a shard is unreachable for longer than the client's bound.
        """
        computed = self._gradients.next(self._weights)
        self._take_replies()
        self._latest = computed
        counters, sample = self.counters, computed.sample
        counters.gradients += 1
        counters.loss = float(computed.loss)
        counters.loss_sum += counters.loss
        if self._priorities is not None:
            self._priorities.update(sample.key, sample.shard, computed.absolute_error)
            counters.priorities_dropped = self._priorities.dropped
        due = counters.gradients % self._config.learner_pull_period == 0
        if self._outlier_test.drops(counters.loss):
            counters.outliers += 1
            if due:
                self._refresh(self._parameters.pull())
            return
        message = computed.gradient, computed.version, due
        if self._config.overlap_push:
            self._pending.append(self._parameters.push_async(*message))
        else:  # without the hand-over to a thread
            self._take_reply(functools.partial(self._parameters.push, *message))

    def _weights(self, sample: Any) -> np.ndarray | None:
        """Importance weights float32 [batch_size], or None if the replay draws uniformly."""
        if self._priorities is None:
            return None
        exponent = importance_exponent(self._config, self.clock.updates)
        return importance_weights(sample.probability, sample.shard, exponent)

    def describe(self) -> dict[str, float]:
        """Figures of the latest batch, empty before the first; takes about a forward pass.

        Returns:
          loss: mean loss, without importance weights.
          mean_absolute_error: of the errors (see agents/heads.py).
          gradient_norm: before clipping.
          mean_q, max_q: expected return of the actions taken, by the newest parameters, and the
            largest of any row and action; absent for a user's agent.
          mean_priority, max_priority: as written to the replay; absent if it is uniform.
        """
        if self._latest is None:
            return {}
        latest = self._latest
        errors = latest.absolute_error
        figures = {
            'loss': self.counters.loss,
            'mean_absolute_error': float(np.mean(errors)),
            'gradient_norm': float(np.linalg.norm(latest.gradient) / latest.clip_factor),
        }
        transition = latest.sample.transition
        values = self._network.values(transition.observation, transition.action)
        if values is not None:
            figures |= dict(zip(('mean_q', 'max_q'), values))
        if self._priorities is not None:
            priorities = priority_of(errors)
            figures |= {'mean_priority': priorities.mean(), 'max_priority': priorities.max()}
        return figures

    def sync(self, agent_steps: int = 0) -> Any:
        """Syncs with the parameter server without a push and returns the clock.

        Args:
          agent_steps: reported steps, made since the last sync by an actor that shares this
            learner's network.
        """
        self.finish_push()
        self._refresh(self._parameters.pull(agent_steps))
        return self.clock

    def close(self) -> None:
        """Finishes pending computations and pushes; call it before closing replay and client."""
        self._gradients.close()
        self.finish_push()

    def finish_push(self) -> None:
        """Waits for the pending pushes and takes their replies: verdict, parameters, target."""
        while self._pending:
            self._take_reply(self._pending.popleft().result)

    def _take_replies(self) -> None:
        """Takes the replies that have come, and waits until another push may be sent."""
        most = self._config.pushes_in_flight
        while self._pending and (len(self._pending) >= most or self._pending[0].done()):
            self._take_reply(self._pending.popleft().result)

    def _take_reply(self, wait: Callable[[], Any]) -> None:
        try:
            reply = wait()
        except NotInitialisedError:
            # A shard restarted without a checkpoint: this learner's parameters are the newest left.
            self._parameters.initialise(self._gradients.parameters())
            self._refresh(self._parameters.pull())
            return
        self.counters.stale += reply.rejected == STALE
        self.counters.invalid += reply.rejected == INVALID
        self.counters.staleness[bisect.bisect_left(STALENESS_BOUNDS, reply.staleness)] += 1
        self._refresh(reply.snapshot)

    def _refresh(self, snapshot: Any) -> None:
        if self.clock is not None and snapshot.clock.updates < self.clock.updates:
            return  # of a push that another one has overtaken
        self.clock = snapshot.clock
        if snapshot.parts is not None:
            self._gradients.set_parameters(snapshot.parts, snapshot.version)
        if snapshot.target_versions != self._target_versions:
            target = self._parameters.pull_target()
            if target.parts is not None:
                self._gradients.set_target(target.parts)
            self._target_versions = target.target_versions
