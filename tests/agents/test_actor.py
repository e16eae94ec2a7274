"""The actor with real games, a real replay shard and a real parameter shard."""

import contextlib

import numpy as np
import pytest
import reverb

from agents import dqn, exploration, py_environment
from agents.actor import Actor, EpisodeTally
from agents.actor_priorities import InitialPriorities
from agents.config import ActorConfig, AgentConfig, EnvironmentConfig, NetworkConfig
from agents.environments.atari import AtariEnvironment
from agents.exploration import Behaviour
from agents.model import family_model
from agents.policy import GreedyPolicy
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.layout import Layout
from infra.replay.adder import Adder
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.priorities import priority_of
from infra.replay.server import ShardConfig, build_tables, start_server
from infra.replay.trajectory import TrajectorySpec
from tests.support import parameter_servers

ENVS, GAMMA = 3, 0.99
SPEC = TrajectorySpec(n_step=2)


@contextlib.contextmanager
def replay_shard(priority_exponent):
    """A replay shard in this process; gives its address."""
    replay = ReplayConfig(
        replay_capacity=10_000,
        min_replay_size=1,
        agent_steps_per_update=0.0,
        priority_exponent=priority_exponent,
    )
    server = start_server(build_tables(ShardConfig(replay, SPEC, telemetry=False), 0))
    try:
        yield f'127.0.0.1:{server.port}'
    finally:
        server.stop()


@pytest.fixture
def acting():
    """Makes an actor of a game on servers in this process; gives it, its client and the table."""
    with contextlib.ExitStack() as stack:

        def make(game='pong', prioritized=False, max_episode_frames=108_000, **actor_values):
            environment_config = EnvironmentConfig(game=game, max_episode_frames=max_episode_frames)
            config = ActorConfig(envs_per_actor=ENVS, **actor_values)
            environment = stack.enter_context(AtariEnvironment(environment_config, ENVS, seed=1))
            agent = dqn.make_agent(
                AgentConfig(n_step=2),
                NetworkConfig('dqn2013'),
                py_environment.time_step_spec(environment_config),
                py_environment.action_spec(environment.num_actions),
            )
            policy = GreedyPolicy(family_model(agent))
            shards = stack.enter_context(
                parameter_servers.serve(parameter_servers.config(num_parameter_shards=1))
            )
            client = stack.enter_context(
                ParameterClient(
                    [shard.address for shard in shards], Layout.from_variables(policy.variables)
                )
            )
            client.initialise(policy.parameters())
            address = stack.enter_context(replay_shard(float(prioritized)))
            adder = stack.enter_context(Adder(address, SPEC, ENVS))
            priorities = None
            if prioritized:
                priorities = InitialPriorities(agent.head, SPEC.n_step, GAMMA)
            acting = Behaviour(
                policy, exploration.annealed(config), environment.num_actions, priorities
            )
            return Actor(config, environment, acting, adder, client), client, adder, address

        yield make


def test_every_step_but_the_last_n_is_stored_and_every_step_is_counted(acting):
    actor, client, adder, address = acting(actor_pull_period=4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        actor.step(rng)
    actor.sync()
    assert client.pull().clock.agent_steps == 20 * ENVS
    assert adder.flush(10.0)
    # A step's item needs n = 2 more rows, so the last two steps of each stream have none yet.
    size = reverb.Client(address).server_info()[EXPERIENCE_TABLE].current_size
    assert size == (20 - 2) * ENVS


def test_the_server_is_asked_only_every_pull_period(acting):
    actor, client, _, _ = acting(actor_pull_period=5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        actor.step(rng)
    assert client.pull().clock.agent_steps == 0  # the sixth step would tell
    actor.step(rng)
    assert client.pull().clock.agent_steps == 5 * ENVS


def test_an_actor_knows_the_agent_steps_of_the_whole_run_as_of_its_last_pull(acting):
    actor, client, _, _ = acting(actor_pull_period=4)
    client.pull(agent_steps=100)  # another actor's
    actor.sync()
    rng = np.random.default_rng(0)
    known = []
    for _ in range(5):
        actor.step(rng)
        known.append(actor.run_agent_steps)
    # The fifth step pulls first, which tells the clock of the four before: 100 + 4 * 3.
    assert known == [103, 106, 109, 112, 115]
    assert actor.clock.agent_steps == 112


def test_a_new_transition_has_the_priority_of_its_own_error(acting):
    # Games cut after 50 decisions, and lives lost before: neither may shift an error to another.
    actor, _, adder, address = acting(
        'breakout', prioritized=True, max_episode_frames=200, actor_pull_period=1000
    )
    rng = np.random.default_rng(0)
    for _ in range(150):
        actor.step(rng)
    assert adder.flush(10.0)
    policy = actor._behaviour._policy
    head = policy.model.head
    probabilities, priorities, ends = [], [], 0
    with sample_dataset([address], SPEC, 64, GAMMA) as dataset:
        for _ in range(10):
            sample = next(dataset)
            step = sample.transition
            outputs, following = (
                policy.evaluate(frames)[1] for frames in (step.observation, step.next_observation)
            )
            taken = outputs[np.arange(64), step.action]
            _, error = head.loss(taken, following.max(axis=1), step.reward, step.discount)
            probabilities.append(sample.probability)
            priorities.append(priority_of(error))
            ends += (step.discount == 0).sum()
    assert ends
    # The exponent is 1: each probability is the priority over the sum of all.
    probability, priority = np.concatenate(probabilities), np.concatenate(priorities)
    total = np.median(priority / probability)
    np.testing.assert_allclose(probability * total, priority, rtol=1e-3, atol=1e-5)


def test_same_seed_acts_the_same(acting):
    first, _, _, _ = acting()
    second, _, _, _ = acting()
    for _ in range(10):
        first.step(np.random.default_rng(5))
        second.step(np.random.default_rng(5))
    np.testing.assert_array_equal(first._frames.frame, second._frames.frame)


def test_games_end_with_raw_and_clipped_returns(acting):
    actor, _, _, _ = acting('breakout')
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(3000):  # a random game of Breakout has some 200 decisions
        episodes += actor.step(rng)
        if len(episodes) >= 4:
            break
    assert len(episodes) >= 4
    for episode in episodes:
        # A brick of the two lowest rows is worth 1, clipped or not; higher ones 4 and 7.
        assert episode.raw_return >= episode.clipped_return >= 0
        assert episode.agent_steps > 20


def test_tally_adds_up_each_environment_until_its_game_ends():
    tally = EpisodeTally(2)
    no_end, epsilon = np.array([False, False]), np.array([0.5, 0.25])
    assert tally.add(np.array([5.0, 0.0]), np.array([1.0, 0.0]), no_end, epsilon) == []
    ended = tally.add(np.array([7.0, 2.0]), np.array([1.0, 1.0]), np.array([True, False]), epsilon)
    assert [(e.raw_return, e.clipped_return, e.agent_steps) for e in ended] == [(12.0, 2.0, 2)]
    assert ended[0].epsilon == 0.5
    ended = tally.add(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([True, True]), epsilon)
    # The first environment began anew; the second has played all three steps.
    assert [(e.raw_return, e.agent_steps) for e in ended] == [(0.0, 1), (3.0, 3)]
