"""Bundles with real games and replays on real parameter shards, all in this process."""

import contextlib

import numpy as np
import pytest
import reverb

from agents import policy as policy_lib
from infra import telemetry
from infra.parameter_server import client as client_lib
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.status import StatusReader
from pipelines.experiment import presets
from pipelines.experiment.frames import trajectory_spec
from pipelines.experiment.launch import Addresses
from pipelines.workers import boxes
from pipelines.workers import bundle as bundle_lib
from pipelines.workers.bundle import TURN_AGENT_STEPS, open_bundle
from pipelines.workers.segment import Segment
from pipelines.workers.spec import WorkerSpec
from tests.support import parameter_servers

BURST = 16
"""Updates of a turn: 64 decisions at 4 an update."""


class Tape(client_lib.ParameterClient):
    """A client that notes what it pulls, and how old its gradients were when they were applied."""

    tapes: list['Tape'] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pushes = []
        self.modified = []
        self.tapes.append(self)

    def pull(self, agent_steps=0):
        snapshot = super().pull(agent_steps)
        self.modified.append(snapshot.parts is not None)
        return snapshot

    def push(self, gradient, version, pull=True):
        reply = super().push(gradient, version, pull)
        self.pushes.append(lambda: reply)
        return reply

    def push_async(self, gradient, version, pull=True):
        future = super().push_async(gradient, version, pull)
        self.pushes.append(future.result)
        return future

    @property
    def staleness(self):
        """Of each gradient, in updates."""
        return [reply().staleness for reply in self.pushes]


def served(stack, config):
    """Starts the replay shards of an experiment; returns their addresses."""
    shard = ShardConfig(config.served_replay, trajectory_spec(config), telemetry=False)
    servers = [start_server(build_tables(shard, i)) for i in range(config.replay.num_replay_shards)]
    for server in servers:
        stack.callback(stop_server, server)
    return tuple(f'127.0.0.1:{server.port}' for server in servers)


@pytest.fixture
def opened(monkeypatch):
    """Opens two bundles on one pair of shards; gives each with its tape, and the shards."""
    monkeypatch.setattr(client_lib, 'ParameterClient', Tape)
    monkeypatch.setattr(Tape, 'tapes', [])
    monkeypatch.setattr(boxes, 'STATUS_SECONDS', 60.0)  # no batch is late on a busy machine
    with contextlib.ExitStack() as stack:
        queue = reverb.Server([telemetry.build_table()])
        stack.callback(queue.stop)

        def opened(replay=(), **overrides):
            small = {
                'torso': 'dqn2013', 'num_actors': 2, 'num_learners': 2, 'num_parameter_shards': 2,
                'replay_capacity': 2_000, 'min_replay_size': 2,
            }  # fmt: skip
            config = presets.experiment('paper', {**small, **overrides})
            shards = stack.enter_context(parameter_servers.serve(config.parameter_server))
            if not config.run.replay_in_workers:
                opened.replay = replay or served(stack, config)  # type: ignore[attr-defined]
                replay = opened.replay  # type: ignore[attr-defined]
            servers = Addresses(
                tuple(shard.address for shard in shards), replay, f'127.0.0.1:{queue.port}'
            )
            Tape.tapes.clear()
            workers = [
                stack.enter_context(open_bundle(config, servers, WorkerSpec(number, 0)))
                for number in range(2)
            ]
            opened.workers = workers  # type: ignore[attr-defined]
            return zip([worker.box for worker in workers], Tape.tapes, strict=True)

        yield opened


@pytest.mark.parametrize(('mode', 'num_shards'), [('global', 1), ('local', 2)])
def test_bundles_at_servers_learn_from_what_their_shards_hold(opened, mode, num_shards):
    # 64 agent steps each are the minimum; the two environments have begun 5 windows each.
    at_servers = {'bundle_replay': 'servers', 'replay_mode': mode, 'num_replay_shards': num_shards}
    (first, _), (second, _) = opened(**at_servers, min_replay_size=2 * TURN_AGENT_STEPS)
    assert [turn(first, 0), turn(first, 1)] == [0, BURST]
    sizes = [status['size'] for status in StatusReader(opened.replay).read()]
    assert sizes == pytest.approx([2 * TURN_AGENT_STEPS, 0][:num_shards], abs=20)
    assert [turn(second, 0), turn(second, 1)] == [0, BURST]
    sizes = [status['size'] for status in StatusReader(opened.replay).read()]
    assert sum(sizes) == pytest.approx(4 * TURN_AGENT_STEPS, abs=40)


def test_a_bundle_that_begins_again_learns_at_once_from_what_the_servers_hold(opened):
    at_servers = {'bundle_replay': 'servers', 'min_replay_size': TURN_AGENT_STEPS}
    (bundle, _), _ = opened(**at_servers)
    for segment in range(2):
        turn(bundle, segment)
    (again, _), _ = opened(**at_servers, replay=opened.replay)
    assert turn(again, 0) == BURST


def results(monkeypatch, module, name):
    """All that a function of a module returns from now on."""
    made, make = [], getattr(module, name)

    def record(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(module, name, record)
    return made


def turn(bundle, segment):
    """One turn of a bundle: it acts, then it learns."""
    return bundle.learn(bundle.actor.run(segment, TURN_AGENT_STEPS))


@pytest.mark.parametrize(
    ('overlap', 'staleness'), [(False, [0] * BURST), (True, [0] + [1] * (BURST - 1))]
)
def test_a_gradient_is_never_as_old_as_what_others_did_in_the_actors_turn(
    opened, overlap, staleness
):
    # The bundles take turns, so nobody else pushes while one learns: without overlap each gradient
    # is computed from what the one before brought back, 0 updates old. With overlap it is computed
    # while the one before travels, and so 1 update old, except the first: there is none before it.
    # The other bundle's 16 updates, made while this one waited, are in none.
    bundles = list(opened(overlap_push=overlap))
    for segment in range(2):
        for bundle, tape in bundles:
            tape.pushes.clear()
            turn(bundle, segment)
    for _, tape in bundles:
        assert tape.staleness == staleness


def test_what_a_bundle_asks_before_each_step_brings_nothing_unless_others_pushed(opened):
    (first, tape), (second, _) = opened(actor_pull_period=1)
    for segment in range(2):
        turn(first, segment)
        turn(second, segment)
    tape.modified.clear()
    first.actor.run(2, TURN_AGENT_STEPS)
    # The first step acts with what the learner's last push brought. Before the second comes what
    # the other bundle pushed, once; what this one's own learner has is never fetched again.
    assert tape.modified == [True] + [False] * (TURN_AGENT_STEPS - 2)


def test_actor_and_learner_of_a_bundle_have_one_network_which_is_the_newest(opened, monkeypatch):
    networks = results(monkeypatch, boxes, 'learners_network')
    policies = results(monkeypatch, policy_lib, 'GreedyPolicy')
    (bundle, tape), (other, _) = opened()
    for segment in range(2):
        turn(bundle, segment)
        turn(other, segment)
    clock = bundle.actor.sync()
    with parameter_servers.connect([c.address for c in tape.connections], tape.layout) as observer:
        newest = observer.pull().values
        assert [shard['clients'] for shard in observer.report()['shards']] == [3, 3]  # itself too
    np.testing.assert_array_equal(policies[0].parameters(), newest)
    np.testing.assert_array_equal(networks[0].parameters(), newest)
    assert clock.agent_steps == 4 * TURN_AGENT_STEPS


def test_segments_that_an_engine_runs_twice_have_their_effects_once(opened, monkeypatch):
    monkeypatch.setattr(bundle_lib, '_TURNS', 2)
    ((bundle, tape), _), (worker, _) = opened(), opened.workers
    committed: list[Segment] = []
    part: list[Segment] = []
    for first in range(0, 14, 2):  # of each part the engine loses the last two, and repeats them
        worker.begin(first)
        part = [worker.segment(number) for number in range(first, first + 4)]
        committed += part[:2]
    committed += part[2:]
    assert [segment.segment for segment in committed] == list(range(16))
    shards = tape.report()['shards']
    # 16 segments of two turns, each of 64 decisions and then 16 updates.
    agent_steps = sum(segment.agent_steps for segment in committed)
    gradients = sum(segment.gradients for segment in committed)
    assert (agent_steps, gradients) == (16 * 2 * TURN_AGENT_STEPS, 16 * 2 * BURST - 1)
    assert shards[0]['agent_steps'] == agent_steps
    rejected = sum(s.outliers + s.stale + s.invalid for s in committed)
    assert shards[0]['version'] == gradients - rejected
    # What is on its way, and the windows that the environments have begun, are not there yet.
    inserts = bundle.actor._replay.read()[0]['inserts']
    assert inserts == pytest.approx(agent_steps, abs=150)
