"""Warnings from a run's figures: a `RunState` in, messages out."""

from collections.abc import Iterator

from agents.config import BUILTIN
from pipelines.experiment.config import ExperimentConfig
from pipelines.monitoring.run_state import RunState

_MANY_OUTLIERS = 0.001  # share of dropped gradients that is worth a warning
_FEW_GRADIENTS = 1_000  # too few to estimate that share
# [here] Of the mean error, from the mean value to the largest. Measured with `laptop`: 0.03 to 0.1
# in Pong and Breakout that never learned, 4 after 5,000 updates of Breakout that did.
_EQUAL_VALUES = 0.2
_FEW_UPDATES = 20_000  # [here] four times as many
_FEW_TARGETS = 3  # [here] values reach back a target network at a time


def advice(state: RunState, config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yields subject and text of each warning that applies."""
    if state.updates >= _FEW_GRADIENTS and (state.outlier_share or 0.0) > _MANY_OUTLIERS:
        yield (
            'outliers',
            f'{state.outlier_share:.2%} of the gradients are dropped; they may hold rare'
            ' rewards. Fix: --outlier_rule lone, or --outlier_deviations 0.',
        )
    if state.updates >= _enough_updates(config) and config.agent.agent == 'dqn':
        yield from _equal_values(state, config)


def _enough_updates(config: ExperimentConfig) -> int:
    """Updates after which states should differ in value: at first all are alike."""
    targets = _FEW_TARGETS * config.parameter_server.target_update_period
    annealing = 0 if config.actor.epsilon_ladder else config.actor.epsilon_updates
    return max(_FEW_UPDATES, targets, annealing)


def _remedies(config: ExperimentConfig) -> str:
    """Flags that keep units alive, as far as the network has them and the run has not."""
    network, flags = config.network, []
    if network.q_network != BUILTIN:
        return ''
    if config.environment.is_atari and not network.centralize_gradient:
        flags.append('--centralize_gradient')
    if not network.negative_slope:
        flags.append('--negative_slope 0.01')
    return f'{" ".join(flags)}, or with ' * bool(flags)


def _equal_values(state: RunState, config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """A warning if the largest value of a batch is hardly above the mean."""
    names = 'mean_q', 'max_q', 'mean_absolute_error'
    if not all(name in state.learner for name in names):  # no batch yet
        return
    mean, largest, error = (state.learner[name] for name in names)
    if largest - mean < _EQUAL_VALUES * error:
        yield (
            'values',
            f'nearly equal in all states (mean {mean:.3f}, largest {largest:.3f}, mean error'
            f' {error:.3f}); large steps may have killed units of the network. Fix: if the return'
            f' does not rise, start again with {_remedies(config)}a lower --learning_rate and'
            ' --learning_rate_end.',
        )
