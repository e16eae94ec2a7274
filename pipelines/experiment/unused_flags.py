"""Rejects flags that have no effect given the other settings."""

from collections.abc import Callable, Mapping
from typing import Any

from agents.config import BUILTIN
from pipelines import errors
from pipelines.experiment.config import ExperimentConfig


def _agents(*names: str) -> Callable[[ExperimentConfig], bool]:
    """Whether the agent is one of `names`, or a custom agent, which may read any setting."""
    return lambda config: config.agent.agent in names or ':' in config.agent.agent


def _optimizer(name: str) -> Callable[[ExperimentConfig], bool]:
    return lambda config: config.parameter_server.optimizer == name


_MUNCHAUSEN = ('--munchausen', lambda config: config.agent.munchausen)
_C51 = ('--agent c51', _agents('c51'))
_IQN = ('--agent iqn', _agents('iqn'))
_ANNEALED = ('--no-epsilon_ladder', lambda config: not config.actor.epsilon_ladder)
_LADDER = ('--epsilon_ladder', lambda config: config.actor.epsilon_ladder)
_PRIORITIZED = ('--priority_exponent above 0', lambda config: config.replay.prioritized)
_EVALUATOR = (
    '--evaluator_cpu_share above 0',
    lambda config: config.run.evaluator_cpu_share > 0,
)
_SEPARATE = ('--topology separate', lambda config: config.run.topology == 'separate')
_BUNDLED = ('--topology bundled', lambda config: config.run.topology == 'bundled')
_SERVED = (
    '--topology separate or --bundle_replay servers',
    lambda config: not config.run.replay_in_workers,
)
_ATARI = ('an Atari game', lambda config: config.environment.is_atari)
_ELSEWHERE = ('an environment outside Atari', lambda config: not config.environment.is_atari)
_BUILTIN = ('--q_network builtin', lambda config: config.network.q_network == BUILTIN)
_OVERLAPPED = ('--overlap_push', lambda config: config.learner.overlap_push)
_RMSPROP = ('--optimizer rmsprop', _optimizer('rmsprop'))
_ADAM = ('--optimizer adam', _optimizer('adam'))

_NEEDS: Mapping[str, tuple[str, Callable[[ExperimentConfig], bool]]] = {
    'loss': ('--agent dqn', _agents('dqn')),
    'munchausen_temperature': _MUNCHAUSEN,
    'munchausen_scale': _MUNCHAUSEN,
    'munchausen_lowest': _MUNCHAUSEN,
    'num_atoms': _C51,
    'v_min': _C51,
    'v_max': _C51,
    'num_fractions': _IQN,
    'num_acting_fractions': _IQN,
    'num_cosines': _IQN,
    'num_quantiles': ('--agent qr_dqn', _agents('qr_dqn')),
    'epsilon_start': _ANNEALED,
    'epsilon_end': _ANNEALED,
    'epsilon_updates': _ANNEALED,
    'ladder_epsilon': _LADDER,
    'ladder_exponent': _LADDER,
    'importance_exponent_start': _PRIORITIZED,
    'importance_exponent_end': _PRIORITIZED,
    'importance_updates': _PRIORITIZED,
    'actor_priorities': _PRIORITIZED,
    'evaluator_episodes': _EVALUATOR,
    'evaluation_period_updates': _EVALUATOR,
    'bundle_replay': _BUNDLED,
    'replay_mode': _SERVED,
    'sample_insert_tolerance': _SEPARATE,
    'checkpoint_replay': _SERVED,
    'batches_in_flight': _SEPARATE,
    'pushes_in_flight': _OVERLAPPED,
    'outlier_decay': (
        '--outlier_deviations above 0',
        lambda config: config.learner.outlier_deviations > 0,
    ),
    'learning_rate_end': (
        '--learning_rate_updates above 0',
        lambda config: config.parameter_server.learning_rate_updates > 0,
    ),
    'optimizer_epsilon': (
        '--optimizer rmsprop or adam',
        lambda config: config.parameter_server.optimizer != 'adagrad',
    ),
    'optimizer_decay': _RMSPROP,
    'optimizer_momentum': _RMSPROP,
    'adam_beta_1': _ADAM,
    'adam_beta_2': _ADAM,
    **dict.fromkeys(
        (
            'action_repeat',
            'screen_size',
            'max_noops',
            'max_episode_frames',
            'sticky_action_probability',
            'life_loss_ends_episode',
            'full_action_space',
        ),
        _ATARI,
    ),
    'env_processes': _ELSEWHERE,
    'dense_layers': _ELSEWHERE,  # preflight, which sees observations, checks more
    'torso': _BUILTIN,
    'center_input': (
        '--q_network builtin and --no-standardize_input',
        lambda config: _BUILTIN[1](config) and not config.network.standardize_input,
    ),
    'standardize_input': _BUILTIN,
    'centralize_gradient': _BUILTIN,
    'negative_slope': _BUILTIN,
    'precision': (
        _BUILTIN[0],
        lambda config: _BUILTIN[1](config) or config.network.precision == 'auto',
    ),
    'adagrad_initial_accumulator': ('--optimizer adagrad', _optimizer('adagrad')),
}


def require_effect(config: ExperimentConfig, values: Mapping[str, Any]) -> None:
    """Checks that each of the given `values` has an effect in `config`.

    Raises:
      UsageError: a value has no effect.
    """
    errors.require_effect(
        values,
        {name: (needed, holds(config)) for name, (needed, holds) in _NEEDS.items()},
    )
