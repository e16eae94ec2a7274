"""What a run's figures give reason to warn of: a state in, messages out."""

from collections.abc import Iterator, Mapping

from pipelines.monitoring.run_state import RunState

_MANY_OUTLIERS = 0.001  # share of dropped gradients that is worth a warning
_FEW_GRADIENTS = 1_000  # too few to estimate that share
# Of the mean error. Runs of Pong and Breakout that never learned had 0.03 to 0.1, others above 1.
_EVEN_VALUES = 0.2
_FEW_UPDATES = 20_000  # all states are alike at first, for thousands of updates at small rates


def advice(state: RunState, agent: str) -> Iterator[tuple[str, str]]:
    """Subject and message of each warning to a run of an agent, while there is reason for it."""
    if state.updates >= _FEW_GRADIENTS and (state.outlier_share or 0.0) > _MANY_OUTLIERS:
        yield (
            'outliers',
            f'{state.outlier_share:.2%} of the gradients are dropped; they may hold rare'
            ' rewards. Fix: --outlier_rule lone, or --outlier_deviations 0.',
        )
    # The errors of C51 are divergences, which do not compare with values.
    if state.updates >= _FEW_UPDATES and agent != 'c51' and _values_are_even(state.learner):
        yield (
            'values',
            'those of all states are nearly equal, so nothing has been learned; too large steps'
            ' may have killed units of the network. Fix: if the return does not rise, start again'
            ' with a lower --learning_rate.',
        )


def _values_are_even(figures: Mapping[str, float]) -> bool:
    """Whether the best value of a batch is hardly above the mean, measured by the mean error."""
    try:
        spread = figures['max_q'] - figures['mean_q']
        return spread < _EVEN_VALUES * figures['mean_absolute_error']
    except KeyError:  # no batch yet, or a user's agent
        return False
