"""What the outlier rules do to a game's rare rewards; prints JSON.

python -m tests.benchmarks.benchmark_outliers --game private_eye

One DQN (the network of 2013, batches of 32, one step) learns from the same random play by each
rule. Of its batches those with a reward count, and how many of their gradients the rule drops;
and the mean value, in the end, of the actions that were rewarded.
"""

import argparse
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from agents import dqn, py_environment
from agents.config import AgentConfig, EnvironmentConfig, LearnerConfig, NetworkConfig
from agents.environments.atari import AtariEnvironment
from agents.environments.frames import FrameStack
from agents.gradient import AgentGradient
from agents.learner import OutlierTest
from agents.model import family_model
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.optimizers import OptimizedSlice
from infra.replay.trajectory import Transition

_BATCH, _ENVIRONMENTS = 32, 4
_DISCOUNT = 0.99
_TARGET_PERIOD = 500  # updates
_RULES = {
    'off': LearnerConfig(outlier_deviations=0.0),
    'every': LearnerConfig(outlier_rule='every'),
    'lone': LearnerConfig(outlier_rule='lone'),
}


class Play(NamedTuple):
    """Agent steps of E environments in turn: row `i + E` is what came of row `i`."""

    observation: np.ndarray  # uint8 [steps + E, 84, 84, 4]
    action: np.ndarray  # int32 [steps]
    reward: np.ndarray  # float32 [steps]
    discount: np.ndarray  # float32 [steps]

    def rows(self, rows: np.ndarray) -> Transition:
        """The transitions of these rows."""
        return Transition(
            self.observation[rows],
            self.action[rows],
            self.reward[rows],
            self.discount[rows],
            self.observation[rows + _ENVIRONMENTS],
        )


def random_play(game: str, steps: int) -> tuple[Play, int]:
    """So many agent steps, and the number of the game's actions."""
    rng = np.random.default_rng(0)
    columns: list[tuple] = []
    with AtariEnvironment(EnvironmentConfig(game=game), _ENVIRONMENTS, seed=0) as games:
        stack = FrameStack(_ENVIRONMENTS, 4, games.frame_spec)
        frames = games.reset()
        while len(columns) * _ENVIRONMENTS < steps:
            observation = stack.push(frames.frame, frames.first).copy()
            action = rng.integers(games.num_actions, size=_ENVIRONMENTS).astype(np.int32)
            frames = games.step_frames(action)
            discount = np.where(frames.first, 0.0, _DISCOUNT).astype(np.float32)
            columns.append((observation, action, np.clip(frames.reward, -1, 1), discount))
        last = stack.push(frames.frame, frames.first)
        observations, *numbers = map(np.concatenate, zip(*columns))
        return Play(np.concatenate([observations, last]), *numbers), games.num_actions


def batches(play: Play) -> Iterator[Transition]:
    """Uniform draws, the same at each call."""
    rng = np.random.default_rng(1)
    while True:
        yield play.rows(rng.integers(len(play.reward), size=_BATCH))


def learn(play: Play, num_actions: int, rule: LearnerConfig, updates: int) -> dict:
    """Learns from `play`; what became of the batches with a reward."""
    agent = dqn.make_agent(
        AgentConfig(double_dqn=True, discount=_DISCOUNT, n_step=1),
        NetworkConfig('dqn2013', center_input=True),
        py_environment.time_step_spec(EnvironmentConfig()),
        py_environment.action_spec(num_actions),
    )
    gradient, test = AgentGradient(family_model(agent), gradient_clip_norm=10.0), OutlierTest(rule)
    part = OptimizedSlice(
        ParameterServerConfig(optimizer='adam', learning_rate=3e-4), gradient.size
    )
    np.copyto(part.parameters, gradient.parameters())
    dropped = dropped_rewards = rewards = 0
    for update, batch in zip(range(updates), batches(play)):
        if update % _TARGET_PERIOD == 0:
            gradient.set_target(part.parameters)
        flat, loss, *_ = gradient.gradient(batch)
        drops, rewarded = test.drops(float(loss)), bool(np.any(batch.reward))
        dropped += drops
        rewards += rewarded
        dropped_rewards += drops and rewarded
        if not drops:
            part.step(tf.constant(flat), update=1)
            gradient.set_parameters(part.parameters)
    return {
        'batches_with_a_reward': rewards,
        'of_them_dropped': round(dropped_rewards / max(rewards, 1), 4),
        'of_all_dropped': round(dropped / updates, 5),
        'value_of_what_was_rewarded': round(value_of_rewarded(agent, play), 3),
    }


def value_of_rewarded(agent: dqn.DqnAgent, play: Play) -> float:
    """Mean value of the actions that a reward of 1 followed."""
    (rows,) = np.nonzero(play.reward > 0)
    outputs, _ = agent.q_network(tf.constant(play.observation[rows]))
    values = agent.head.values(outputs)
    return float(np.mean(np.take_along_axis(np.asarray(values), play.action[rows, None], axis=1)))


def main() -> None:
    """Measures every rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--game', default='private_eye')
    parser.add_argument('--steps', type=int, default=40_000, help='agent steps of random play')
    parser.add_argument('--updates', type=int, default=12_000)
    options = parser.parse_args()
    play, num_actions = random_play(options.game, options.steps)
    rarity = len(play.reward) / max(np.count_nonzero(play.reward), 1)
    result = {
        name: learn(play, num_actions, rule, options.updates) for name, rule in _RULES.items()
    }
    print(json.dumps({'game': options.game, 'steps_a_reward': round(rarity), **result}, indent=2))


if __name__ == '__main__':
    main()
