"""What the actor stores of environments beside Atari, sampled back from a real replay shard."""

import contextlib

import numpy as np
import pytest
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from agents import dqn, exploration, py_environment
from agents.actor import Actor
from agents.config import ActorConfig, AgentConfig, EnvironmentConfig, NetworkConfig
from agents.environments.factory import open_environment
from agents.exploration import Behaviour
from agents.model import family_model
from agents.policy import GreedyPolicy
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.layout import Layout
from infra.replay.adder import Adder
from infra.replay.config import ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.server import ShardConfig, build_tables, start_server
from infra.replay.trajectory import TrajectorySpec, observation_shape
from tests.support import parameter_servers
from tests.support.environments import LENGTH

ENVS, GAMMA, EPISODES = 2, 0.5, 4
OWN = 'tests.support.environments'


def play(stack, name, n_step, steps, frame_stack=1):
    """Plays and stores; gives the actor, the address of the shard and the spec of what it holds."""
    config = ActorConfig(envs_per_actor=ENVS, clip_reward=False)
    environment = stack.enter_context(
        open_environment(EnvironmentConfig(game=f'{OWN}:{name}'), ENVS, seed=1)
    )
    frame = environment.frame_spec
    shape = observation_shape(frame.shape, frame_stack)
    agent = dqn.make_agent(
        AgentConfig(n_step=n_step),
        NetworkConfig(dense_layers='8'),
        ts.time_step_spec(array_spec.ArraySpec(shape, np.dtype(frame.dtype))),
        py_environment.action_spec(environment.num_actions),
    )
    policy = GreedyPolicy(family_model(agent))
    (shard,) = stack.enter_context(
        parameter_servers.serve(parameter_servers.config(num_parameter_shards=1))
    )
    layout = Layout.from_variables(policy.variables)
    client = stack.enter_context(ParameterClient([shard.address], layout))
    client.initialise(policy.parameters())
    spec = TrajectorySpec(frame.shape, frame_stack, n_step, frame.dtype)
    replay = ReplayConfig(replay_capacity=10_000, min_replay_size=1, agent_steps_per_update=0.0)
    server = start_server(build_tables(ShardConfig(replay, spec, telemetry=False), 0))
    stack.callback(server.stop)
    address = f'127.0.0.1:{server.port}'
    adder = stack.enter_context(Adder(address, spec, ENVS))
    behaviour = Behaviour(policy, exploration.annealed(config), environment.num_actions, None)
    actor = Actor(config, environment, behaviour, adder, client, frame_stack)
    rng = np.random.default_rng(0)
    episodes = [episode for _ in range(steps) for episode in actor.step(rng)]
    assert adder.flush(10.0)
    return actor, episodes, address, spec


def sampled(address, spec):
    """The distinct transitions: (episode, step, next step, reward, discount) of each."""
    found = set()
    with sample_dataset([address], spec, 64, GAMMA) as dataset:
        for _ in range(40):  # some 60 transitions: none is missed by 2,560 draws
            drawn = next(dataset).transition
            for row in zip(*drawn):
                (seed, episode, step), _, reward, discount, (next_seed, *following) = row
                assert seed == next_seed or discount == 0
                after = tuple(int(x) for x in following) if discount else None
                found.add((int(seed), int(episode), int(step), after, float(reward), discount))
    return found


def expected(seeds, n_step, shows_last):
    """The same by a plain loop over whole episodes; step t earns t + 1, odd episodes are cut."""
    found = set()
    for seed in seeds:
        for episode in range(EPISODES):
            for t in range(LENGTH):
                end = t + n_step
                ended = not episode % 2 and end >= LENGTH
                # It would bootstrap from beyond the cut, or from what is not shown.
                if episode % 2 and end > (LENGTH if shows_last else LENGTH - 1):
                    continue
                rewards = [GAMMA**k * (t + k + 1) for k in range(min(n_step, LENGTH - t))]
                after = None if ended else (episode, end)
                discount = 0.0 if ended else GAMMA**n_step
                found.add((seed, episode, t, after, float(sum(rewards)), discount))
    return found


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize(
    ('name', 'shows_last'),
    [
        ('counter', True),
        ('next_step', True),
        ('py_counter', True),
        ('same_step', False),
        ('disabled', False),
    ],
)
def test_stored_transitions_equal_a_plain_loop_a_cut_episode_bootstraps_an_ended_one_does_not(
    name, shows_last, n_step
):
    rows = LENGTH + shows_last  # of an episode
    with contextlib.ExitStack() as stack:
        actor, episodes, address, spec = play(stack, name, n_step, steps=rows * EPISODES + 4)
        found = sampled(address, spec)
        assert actor.sync().agent_steps == actor.agent_steps  # as the budget counts them
    whole = {row for row in found if row[1] < EPISODES}
    assert whole == expected({row[0] for row in found}, n_step, shows_last)
    assert len({row[0] for row in found}) == ENVS
    # A row that shows a last observation is no decision, and no episode counts it.
    assert actor.agent_steps == ENVS * (LENGTH * EPISODES + 4)
    assert [episode.agent_steps for episode in episodes] == [LENGTH] * ENVS * EPISODES
    assert {episode.raw_return for episode in episodes} == {sum(range(LENGTH + 1))}
