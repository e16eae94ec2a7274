"""The watch over a run: real parameter shards and checkpoints, servers that fail as told."""

import contextlib
import io
import types

import numpy as np
import pytest

from infra.parameter_server.protocol import ParameterServerUnavailable
from infra.replay.errors import ReplayUnavailable
from pipelines import presets
from pipelines import training as training_lib
from pipelines.checkpoints import Checkpoints
from pipelines.display import PlainDisplay
from pipelines.monitor import Monitor, MonitorConfig
from pipelines.run_directory import RunDirectory
from pipelines.training import LastCheckpointError, Replay, Training
from tests import parameter_servers

MONITOR = MonitorConfig(game='pong', preset='laptop', seed=1, max_frames=1000)


@pytest.fixture
def training(tmp_path):
    """A training with initialised parameter shards and without workers; gives it and its output."""
    server = parameter_servers.config(num_parameter_shards=2)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(tmp_path / 'run'))
        directory.config_file.write_text('{}')
        shards = stack.enter_context(parameter_servers.serve(server))
        client = stack.enter_context(parameter_servers.connect([shard.address for shard in shards]))
        client.initialise(np.zeros(client.layout.size, np.float32))
        config = presets.experiment('laptop', {'num_actors': 3})
        told = io.StringIO()
        yield (
            Training(
                config=config,
                display=PlainDisplay(told),
                owner='run',
                interrupted=str,
                cluster=types.SimpleNamespace(restarts={}, abandoned=frozenset()),  # type: ignore[arg-type]
                client=client,
                reader=types.SimpleNamespace(drain=lambda timeout_seconds: []),  # type: ignore[arg-type]
                jobs=types.SimpleNamespace(restarts={}, submissions=2, news=list),  # type: ignore[arg-type]
                monitor=stack.enter_context(Monitor(directory, MONITOR)),
                checkpoints=Checkpoints(directory, config),
                replay=Replay(('replay:1',), types.SimpleNamespace(read=list)),  # type: ignore[arg-type]
            ),
            told,
            directory,
        )


@pytest.fixture
def dead_replay(monkeypatch):
    """No replay shard can write a checkpoint."""

    def fail(addresses, timeout_seconds):
        raise ReplayUnavailable('replay shard replay:1 wrote no checkpoint')

    monkeypatch.setattr('infra.replay.server.save', fail)


def test_the_last_checkpoint_is_written_without_a_replay_that_cannot_be_had(training, dead_replay):
    run, told, directory = training
    run._last_checkpoint()
    (path,) = directory.latest_checkpoints()
    assert not (path / 'replay').exists()
    assert 'without the replay' in told.getvalue()


def test_a_checkpoint_on_the_way_keeps_parameters_and_replay_together(training, dead_replay):
    run, told, directory = training
    run._checkpoint()
    assert not directory.latest_checkpoints()  # the one before stays in force
    assert 'no checkpoint written: replay shard replay:1' in told.getvalue()


def test_a_run_whose_learning_cannot_be_saved_says_so(training, dead_replay, monkeypatch):
    run, _, _ = training

    def full(directory):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(run.client, 'save', full)
    with pytest.raises(LastCheckpointError, match='could not be saved'):
        run._last_checkpoint()


def test_a_run_with_servers_of_others_has_a_checkpoint_from_its_first_update_on(training):
    run, _, directory = training
    run.cluster.config = types.SimpleNamespace(parameter_addresses=('host:1', 'host:2'))
    run.checkpoints = Checkpoints(directory, run.config, replay_is_ours=False)
    run._save_if_due()
    assert not directory.latest_checkpoints()  # nothing is learned yet
    run.monitor.clock(1, 1_600)
    run._save_if_due()
    run._save_if_due()
    (path,) = directory.latest_checkpoints()  # the next one is due in minutes
    assert not (path / 'replay').exists()


@pytest.fixture
def hanging(training, monkeypatch):
    """A training whose parameter shard answers nobody; gives it, its output, what it killed."""
    run, told, _ = training
    killed: list[str] = []

    def report(timeout_seconds, owner):
        raise ParameterServerUnavailable('host:1', 'no answer', 'start it again')

    monkeypatch.setattr(run.client, 'report', report)
    run.cluster.kill = lambda address: [killed.append(address)]  # type: ignore[func-returns-value]
    run.cluster.config = types.SimpleNamespace(parameter_addresses=())
    return run, told, killed


def test_a_shard_of_ours_that_hangs_is_killed_after_the_bound(hanging, monkeypatch):
    run, told, killed = hanging
    run._ask()
    assert 'parameter shard host:1: no answer' in told.getvalue()
    assert not killed  # it may be restarting
    monkeypatch.setattr(training_lib, '_HUNG_SECONDS', 0.0)
    run._ask()
    run._ask()
    assert killed == ['host:1', 'host:1']  # once for each bound


def test_a_shard_of_others_that_stays_away_ends_the_run(hanging, monkeypatch):
    run, _, killed = hanging
    run.cluster.config.parameter_addresses = ('host:1',)
    run._ask()
    monkeypatch.setattr(training_lib, '_AWAY_SECONDS', 0.0)
    with pytest.raises(ParameterServerUnavailable, match='host:1'):
        run._ask()
    assert not killed


def test_nothing_is_saved_from_shards_that_are_away(hanging):
    run, _, _ = hanging
    run._ask()
    with pytest.raises(LastCheckpointError):
        run._last_checkpoint()  # at once: a save would wait for them


def test_a_bundle_that_starts_late_does_not_shift_the_others_counts(training):
    run, _, _ = training
    run.replay = Replay((), run.replay.status)

    def tell(worker, inserts):
        status = {'size': inserts, 'inserts': inserts, 'samples': 0}
        event = {'kind': 'actor', 'component': 'bundle', 'worker': worker, 'replay': status}
        run.reader.drain = lambda timeout_seconds: [event]
        run._look()
        run._ask()

    tell(1, 100)
    tell(0, 40)  # was taken for bundle 1's place before
    tell(1, 120)
    assert run.monitor.counters()['inserts'] == 40 + 120
