"""What the actor stores of environments beside Atari, sampled back from a real replay shard."""

import contextlib

import numpy as np
import pytest
import tree

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
from infra.replay.trajectory import FramePart, TrajectorySpec
from tests.support import parameter_servers
from tests.support.environments import LENGTH

ENVS, GAMMA, EPISODES = 2, 0.5, 4
OWN, OF_TF = 'tests.support.environments', 'tests.support.tf_environments'


def picture(step):
    return np.full((10, 10, 1), step, np.uint8)


FRAMES = {
    'counter': lambda numbers: numbers,
    'structured': lambda numbers: {
        'counter': numbers,
        'picture': picture(numbers[-1]),
        'phase': np.eye(6, dtype=np.uint8)[int(numbers[-1])],
        'pair': (np.array([0.5, -0.5], np.float32), np.array([1, 0], np.int8)),
    },
    'tuple': lambda numbers: (numbers, {'picture': picture(numbers[-1])}),
}
"""What environments show when a `Counter` shows three numbers."""
COUNTERS = {
    'counter': lambda frame: frame,
    'structured': lambda frame: frame['counter'],
    'tuple': lambda frame: frame[0],
}
"""Where those numbers are."""


def play(stack, name, n_step, steps, frame_stack=1):
    """Plays and stores; gives the actor, the address of the shard and the spec of what it holds."""
    config = ActorConfig(envs_per_actor=ENVS, clip_reward=False)
    environment = stack.enter_context(open_environment(EnvironmentConfig(game=name), ENVS, seed=1))
    frame = environment.frame_spec
    agent = dqn.make_agent(
        AgentConfig(n_step=n_step),
        NetworkConfig(dense_layers='8'),
        *py_environment.specs(frame, frame_stack, environment.num_actions),
    )
    policy = GreedyPolicy(family_model(agent))
    (shard,) = stack.enter_context(
        parameter_servers.serve(parameter_servers.config(num_parameter_shards=1))
    )
    layout = Layout.from_variables(policy.variables)
    client = stack.enter_context(ParameterClient([shard.address], layout))
    client.initialise(policy.parameters())
    parts = tree.map_structure(lambda part: FramePart(part.shape, part.dtype), frame)
    spec = TrajectorySpec(parts, frame_stack, n_step)
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


def numbers_of(observation, kind, depth):
    """The newest three numbers of a `Counter`, after a look at all that is shown beside them."""
    frames = [
        tree.map_structure(lambda array: np.split(array, depth, -1)[i], observation)  # noqa: B023
        for i in range(depth)
    ]
    for frame in frames:
        numbers = COUNTERS[kind](frame)
        expected = FRAMES[kind](numbers)
        if not numbers.any():  # before the episode
            expected = tree.map_structure(np.zeros_like, expected)
        tree.map_structure(np.testing.assert_array_equal, frame, expected)
        kinds = [tree.map_structure(lambda array: array.dtype, each) for each in (frame, expected)]
        assert kinds[0] == kinds[1]
    return tuple(numbers)


def sampled(address, spec, kind):
    """The distinct transitions: (episode, step, next step, reward, discount) of each."""
    found = set()
    with sample_dataset([address], spec, 64, GAMMA) as dataset:
        for _ in range(40):  # some 60 transitions: none is missed by 2,560 draws
            drawn = next(dataset).transition
            for i in range(64):
                row = tree.map_structure(lambda column: column[i], drawn)  # noqa: B023
                now, _, reward, discount, later = row
                seed, episode, step = numbers_of(now, kind, spec.frame_stack)
                next_seed, *following = numbers_of(later, kind, spec.frame_stack)
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
    ('name', 'kind', 'depth', 'shows_last'),
    [
        (f'{OWN}:counter', 'counter', 1, True),
        (f'{OWN}:next_step', 'counter', 1, True),
        (f'{OWN}:py_counter', 'counter', 1, True),
        (f'{OWN}:same_step', 'counter', 1, False),
        (f'{OWN}:disabled', 'counter', 1, False),
        (f'{OWN}:structured', 'structured', 2, True),
        (f'{OWN}:structured_next_step', 'structured', 1, True),
        (f'{OWN}:structured_same_step', 'structured', 2, False),
        (f'{OWN}:structured_disabled', 'structured', 1, False),
        (f'{OF_TF}:structured', 'tuple', 2, True),
    ],
)
def test_stored_transitions_equal_a_plain_loop_a_cut_episode_bootstraps_an_ended_one_does_not(
    name, kind, depth, shows_last, n_step
):
    rows = LENGTH + shows_last  # of an episode
    with contextlib.ExitStack() as stack:
        actor, episodes, address, spec = play(stack, name, n_step, rows * EPISODES + 4, depth)
        found = sampled(address, spec, kind)
        assert actor.sync().agent_steps == actor.agent_steps  # as the budget counts them
    whole = {row for row in found if row[1] < EPISODES}
    assert whole == expected({row[0] for row in found}, n_step, shows_last)
    assert len({row[0] for row in found}) == ENVS
    # A row that shows a last observation is no decision, and no episode counts it.
    assert actor.agent_steps == ENVS * (LENGTH * EPISODES + 4)
    assert [episode.agent_steps for episode in episodes] == [LENGTH] * ENVS * EPISODES
    assert {episode.raw_return for episode in episodes} == {sum(range(LENGTH + 1))}
