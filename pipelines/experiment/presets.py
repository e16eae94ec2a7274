"""Presets: named values that override the defaults and that flags override.

Sources: [G] Nair et al. 2015 (the paper), [N] Mnih et al. 2015 (Nature DQN, extended data table 1),
[DQN 3.0] the program published with it, [Zoo] DeepMind's DQN Zoo, [A] Horgan et al. 2018 (Ape-X,
section 4.1 and appendix C), [R] Hessel et al. 2018 (Rainbow, table 1 and "Evaluation
Methodology"), [M] Machado et al. 2018 (section 5), [Y] Young and Tian 2019 (MinAtar, section 4),
[here] not stated in a paper, chosen by us.
"""

from collections.abc import Mapping
from typing import Any

from agents.config import NetworkConfig, is_atari
from pipelines.errors import UsageError
from pipelines.experiment import config as config_lib

PREPROCESSING: Mapping[str, Any] = {
    'action_repeat': 4,  # [N] Methods; [G] 5 preprocesses as [N] does
    'frame_stack': 4,  # [N]
    'max_noops': 30,  # [N]
    'life_loss_ends_episode': True,  # [G] 5
    'clip_reward': True,  # [N]: to [-1, 1], in training only
    'sticky_action_probability': 0.0,  # both papers predate sticky actions
}

EVALUATION: Mapping[str, Any] = {
    'evaluation_protocol': 'noop',  # [G] 5
    'evaluation_episodes': 30,  # [G] 5: no-op starts
    'evaluation_epsilon': 0.05,  # [G] 5
    'evaluation_max_frames': 18_000,  # [G] 5: five minutes of play
}

LATER_EVALUATION: Mapping[str, Any] = {
    'evaluation_protocol': 'rainbow',
    'evaluation_episodes': 30,  # [here] as the other presets
    'evaluation_max_frames': 108_000,  # [A], [R]: thirty minutes of play
}

PAPER: Mapping[str, Any] = {
    'topology': 'bundled',  # [G] 5: topology of all published results
    'num_actors': 100,  # [G] 5
    'num_learners': 100,  # [G] 5
    'num_parameter_shards': 31,  # [G] 5
    'torso': 'nature',  # [G] 5: network of [N]
    'n_step': 1,  # [G] 4.1
    'double_dqn': False,
    'loss': 'huber',  # [N]: the error is clipped to [-1, 1]
    'discount': 0.99,  # [N]
    'optimizer': 'adagrad',  # [G] 5
    # [here] The paper states neither. Early on Pong, squared gradients average about 1e-9, so an
    # accumulator of 0.1 outweighs 1e8 updates and one of 1e-6 a thousand. Of ten pairs (rates 0.003
    # to 0.03, accumulators 1e-8 to 0.1), each trained for 4,000 updates on 20,000 transitions of
    # random play (network of 2013, centered input), this one reduced the loss most, from 0.012 to
    # 0.0018; 0.01 with 0.1, and 0.03 with any, barely reduced it.
    'learning_rate': 0.01,
    'adagrad_initial_accumulator': 1e-6,
    'gradient_clip_norm': 0.0,  # [N] clips the error (Huber), not the gradient
    'batch_size': 32,  # [N]
    'replay_capacity': 100_000_000,  # [G] 5: 1 M frames a bundle, 100 bundles
    'min_replay_size': 5_000_000,  # [N] 50,000 per replay memory
    'agent_steps_per_update': 4.0,  # [N] update frequency
    'target_update_period': 60_000,  # [G] 5: N global updates
    'epsilon_start': 1.0,  # [G] 5
    'epsilon_end': 0.1,  # [G] 5
    'epsilon_updates': 1_000_000,  # [G] 5: global updates
    'envs_per_actor': 1,  # [G] 4
    'overlap_push': True,  # [here] adds one update of staleness to about 100
    'actor_pull_period': 1,  # [G] 4.1: at most every step
    'learner_pull_period': 1,  # [G] 4.1
    'max_staleness': 1_000,  # [here] "maximum delay": ten per learner
    'outlier_deviations': 6.0,  # [here] "several"
    'outlier_rule': 'every',  # [G] 4.3: discards all; other presets keep recurring ones
    'max_frames': 20_000_000_000,  # [here] 200 M per bundle ([N]: 50 M agent steps)
    **PREPROCESSING,
    **EVALUATION,
}

NATURE: Mapping[str, Any] = {
    'topology': 'separate',
    'num_actors': 1,  # [N]: one process; ours: one actor, one learner
    'num_learners': 1,
    'torso': 'nature',
    'n_step': 1,
    'double_dqn': False,
    'loss': 'huber',  # [N]: the error is clipped to [-1, 1]
    'discount': 0.99,  # [N]
    'optimizer': 'rmsprop',  # [N]: centered
    'learning_rate': 0.00025,  # [N]
    'optimizer_decay': 0.95,  # [N]: gradient and squared gradient momentum
    'optimizer_momentum': 0.0,  # [N]: its "gradient momentum" is the decay of the mean
    # [N]: min squared gradient 0.01 for a gradient summed over the batch; ours is averaged.
    'optimizer_epsilon': 0.01 / 32**2,
    'gradient_clip_norm': 0.0,  # [N] clips the error, not the gradient
    'batch_size': 32,  # [N]
    'replay_capacity': 1_000_000,  # [N]
    'min_replay_size': 50_000,  # [N]
    'agent_steps_per_update': 4.0,  # [N]
    # [N] contradicts itself: its table counts 10,000 updates, its algorithm 1 counts steps. Its
    # published program [DQN 3.0] and [Zoo] count 10,000 agent steps, which are 2,500 updates.
    'target_update_period': 2_500,
    'epsilon_start': 1.0,  # [N]
    'epsilon_end': 0.1,  # [N]
    'epsilon_updates': 250_000,  # [N]: 1 M agent steps, 4 per update
    'envs_per_actor': 1,  # [N]
    'actor_pull_period': 4,  # [N]: acts with the newest parameters; 4 steps per update
    'learner_pull_period': 1,
    'overlap_push': False,  # [N]: gradients use the newest parameters
    'outlier_deviations': 0.0,  # [N]: no such test
    'max_frames': 200_000_000,  # [N]: 50 M agent steps
    **PREPROCESSING,
    **EVALUATION,
}

LAPTOP: Mapping[str, Any] = {
    # [here] Chosen by the trials of Pong and Breakout in docs/results.md.
    'topology': 'separate',
    'num_actors': 1,
    'num_learners': 1,  # a second one adds two updates of staleness: docs/results.md
    'screen_size': 42,
    'torso': 'narrow_half',
    'precision': 'auto',  # a sixth less time: docs/performance.md
    'standardize_input': True,
    'centralize_gradient': True,
    'negative_slope': 0.01,
    'n_step': 5,
    'double_dqn': True,
    'priority_exponent': 0.6,
    'optimizer': 'adam',
    'learning_rate': 0.0006,
    'learning_rate_end': 0.0001,
    'learning_rate_updates': 187_500,  # the whole run
    'average_updates': 3_000,
    'optimizer_epsilon': 1e-8,
    'agent_steps_per_update': 4.0,
    'target_update_period': 500,
    'epsilon_end': 0.02,
    'epsilon_updates': 4_000,
    'replay_capacity': 250_000,
    'min_replay_size': 5_000,
    'max_frames': 3_000_000,
    'importance_updates': 187_500,  # the whole run
}

APEX: Mapping[str, Any] = {
    'topology': 'separate',
    'num_actors': 1,  # [here] for two cores; [A]: 360 actors with one environment each
    'envs_per_actor': 32,  # [here] the epsilon ladder spans all environments of all actors
    'num_learners': 1,  # [A]
    'torso': 'nature',  # [A]
    'dueling': True,  # [A]
    'double_dqn': True,  # [A]
    'n_step': 3,  # [A]
    'discount': 0.99,  # [A]
    'loss': 'squared',  # [A]: half of it; hence the factors 2 and 4 below
    'optimizer': 'rmsprop',  # [A]: centered
    'learning_rate': 0.00025 / 4,  # [A]
    'optimizer_decay': 0.95,  # [A]
    'optimizer_momentum': 0.0,  # [A]
    'optimizer_epsilon': 4 * 1.5e-7,  # [A]: it is added to a square
    'gradient_clip_norm': 2 * 40.0,  # [A]
    'batch_size': 512,  # [A]
    'replay_capacity': 500_000,  # [here] 1.5 GB; [A]: 2 M, a soft limit
    'min_replay_size': 50_000,  # [A]
    'agent_steps_per_update': 0.0,  # [A]: no ratio
    'target_update_period': 2_500,  # [A]
    'epsilon_ladder': True,  # [A]
    'ladder_epsilon': 0.4,  # [A]
    'ladder_exponent': 7.0,  # [A]: its alpha
    'priority_exponent': 0.6,  # [A]
    'importance_exponent_start': 0.4,  # [A]: beta stays as it is
    'importance_exponent_end': 0.4,
    'actor_priorities': True,  # [A]
    'actor_pull_period': 100,  # [A]: every 400 frames
    'learner_pull_period': 1,
    'overlap_push': False,  # [A]: gradients use the newest parameters
    'outlier_deviations': 0.0,  # [A]: no such test
    'max_frames': 22_800_000_000,  # [A]: table 1
    **PREPROCESSING,
    **LATER_EVALUATION,
    'evaluation_epsilon': 0.0,  # [A]: the greedy policy
}

RAINBOW_LITE: Mapping[str, Any] = {
    # [R] without noisy networks (epsilon-greedy, as in its ablation) and without gradient scaling
    # at the join of the dueling streams. With two learners and overlapping pushes, gradients are a
    # few updates old; [R] uses one process.
    'topology': 'separate',
    'num_actors': 1,
    'num_learners': 2,  # [here] for two cores
    'agent': 'c51',
    'num_atoms': 51,  # [R]
    'v_min': -10.0,  # [R]
    'v_max': 10.0,  # [R]
    'torso': 'nature',
    'dueling': True,
    'double_dqn': True,
    'n_step': 3,  # [R]
    'discount': 0.99,
    'optimizer': 'adam',  # [R]
    'learning_rate': 0.0000625,  # [R]
    'optimizer_epsilon': 1.5e-4,  # [R]
    'gradient_clip_norm': 10.0,  # [R] as its dueling network (Wang et al. 2016)
    'batch_size': 32,  # [R]
    'replay_capacity': 1_000_000,  # [R]
    'min_replay_size': 20_000,  # [R]: 80,000 frames
    'agent_steps_per_update': 4.0,  # [R]
    'target_update_period': 2_000,  # [R]: 32,000 frames
    'epsilon_start': 1.0,
    'epsilon_end': 0.01,  # [R] without noisy networks
    'epsilon_updates': 15_625,  # [R] without noisy networks: 250,000 frames
    'priority_exponent': 0.5,  # [R]: omega
    'importance_exponent_start': 0.4,  # [R]
    'importance_exponent_end': 1.0,  # [R]
    'importance_updates': 12_500_000,  # [R]: the whole run
    'actor_priorities': False,  # [here] new transitions get 1; [R]: the largest so far
    'outlier_deviations': 0.0,  # [R]: no such test
    'max_frames': 200_000_000,  # [R]
    **PREPROCESSING,
    **LATER_EVALUATION,
    'evaluation_epsilon': 0.001,  # [Zoo] of its agents without noisy networks; [R] with them: 0
}

MACHADO: Mapping[str, Any] = {
    # DQN of [N] under the rules of [M].
    **NATURE,
    'sticky_action_probability': 0.25,  # [M]
    'full_action_space': True,  # [M]: all 18 actions
    'life_loss_ends_episode': False,  # [M]: no signal of lives
    'max_noops': 0,  # [M]: sticky actions instead
    'max_episode_frames': 108_000,  # [M]: thirty minutes
    'epsilon_end': 0.01,  # [M]
    'max_frames': 200_000_000,  # [M]
    'evaluation_protocol': 'machado',
    'evaluation_epsilon': 0.01,  # [M] reports training games at the end
    'evaluation_max_frames': 108_000,  # [M]
}

ELSEWHERE: Mapping[str, Any] = {
    # Outside Atari, whatever the preset: a step is a step, and rewards are what they are.
    'action_repeat': 1,
    'frame_stack': 1,
    'screen_size': 84,
    'max_noops': 0,
    'life_loss_ends_episode': False,
    'clip_reward': False,
    'sticky_action_probability': 0.0,
    'full_action_space': False,
    'evaluation_protocol': 'plain',
    'evaluation_epsilon': 0.0,
    'evaluation_max_frames': 108_000,
}

CLASSIC: Mapping[str, Any] = {
    # [here] Chosen on CartPole, for Acrobot and the like too. Networks are small: one shard.
    'topology': 'separate',
    'num_actors': 1,
    # Stale gradients cost the score here: docs/results.md.
    'num_learners': 1,
    'overlap_push': False,
    'dense_layers': '128,128',
    'n_step': 3,
    'double_dqn': True,
    'loss': 'huber',
    'optimizer': 'adam',
    'learning_rate': 0.002,
    'optimizer_epsilon': 1e-8,
    'batch_size': 128,
    'agent_steps_per_update': 4.0,
    'target_update_period': 100,
    'epsilon_end': 0.05,
    'epsilon_updates': 1_500,
    'replay_capacity': 100_000,
    'min_replay_size': 1_000,
    'evaluation_period_updates': 15_000,  # none within the default budget, which ends in a minute
    'max_frames': 48_000,
}

CART_POLE: Mapping[str, Any] = {
    # [here] The value of an episode of 500 steps comes back in few updates: long returns, whole
    # errors and a young target. Acrobot, whose errors are small, does not learn reliably at this
    # rate (docs/results.md).
    **CLASSIC,
    'n_step': 10,
    'loss': 'squared',
    'gradient_clip_norm': 0.0,  # errors of early episodes are large; Adam divides by their size
    'learning_rate': 0.004,
    'batch_size': 32,
    'target_update_period': 50,
    'max_frames': 32_000,
}

MINATAR: Mapping[str, Any] = {
    # [here] Learns in minutes on two cores; [Y] (docs/results.md has its values as flags) has an
    # update for each step, and 5,000,000 steps.
    **CLASSIC,
    'learning_rate': 0.0005,
    'batch_size': 32,  # [Y]
    'replay_capacity': 100_000,  # [Y]
    'min_replay_size': 5_000,  # [Y]
    'target_update_period': 1_000,  # [Y]
    'epsilon_end': 0.1,  # [Y]
    'epsilon_updates': 20_000,
    'evaluation_period_updates': 10_000,
    'max_frames': 300_000,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    'laptop': LAPTOP,
    'nature': NATURE,
    'paper': PAPER,
    'apex': APEX,
    'rainbow_lite': RAINBOW_LITE,
    'machado': MACHADO,
    'classic': CLASSIC,
    'cart_pole': CART_POLE,
    'minatar': MINATAR,
}

DEFAULT = 'laptop'


def _elsewhere(game: Any) -> bool:
    """Whether a game is not of Atari; what is no name is refused later."""
    return isinstance(game, str) and not is_atari(game)


def default(game: Any) -> str:
    """The preset of a run of this game or environment, unless one is named."""
    if not _elsewhere(game):
        return DEFAULT
    prefixes = {'minatar': 'minatar', 'cartpole': 'cart_pole'}
    found = (preset for prefix, preset in prefixes.items() if game.lower().startswith(prefix))
    return next(found, 'classic')


def experiment(preset: str, overrides: Mapping[str, Any]) -> config_lib.ExperimentConfig:
    """Returns the experiment of `preset` with `overrides` (setting name to value).

    Outside Atari `ELSEWHERE` takes the place of what presets say of emulators.

    Raises:
      UsageError: a preset or setting is unknown, or values are invalid or contradictory.
    """
    if preset not in PRESETS:
        raise UsageError(f'--preset {preset!r}: unknown. Fix: choose one of {", ".join(PRESETS)}.')
    values = dict(PRESETS[preset])
    if _elsewhere(overrides.get('game')):
        values |= ELSEWHERE
        # Pictures there have any size; a torso for half of Atari's is not meant for them.
        values['torso'] = values.get('torso', NetworkConfig.torso).removesuffix('_half')
    values |= overrides
    return config_lib.replace(config_lib.ExperimentConfig(preset=preset), values)
