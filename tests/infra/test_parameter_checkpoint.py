"""Checkpoints: written beside updates, restored into any number of shards, damage found."""

import contextlib
import json

import numpy as np
import pytest

from infra.parameter_server import checkpoint
from infra.parameter_server import connection as connection_lib
from infra.parameter_server.protocol import RequestRefusedError
from infra.parameter_server.server import ParameterServer
from infra.sealed import seal, unseal
from tests.support import sharing
from tests.support.names import ODD_NAME
from tests.support.parameter_servers import LAYOUT, config, connect, serve

_OPTIMIZERS = ['adagrad', 'rmsprop', 'adam']


def _config(**changes):
    return config(learning_rate=0.1, adagrad_initial_accumulator=0.1, **changes)


def _gradients(count):
    return np.random.default_rng(5).normal(size=(count, LAYOUT.size)).astype(np.float32)


def _push(client, gradients):
    for gradient in gradients:
        assert client.push(gradient, client.pull().version).rejected is None


def _serve_restored(stack, server_config, directory):
    servers = []
    for shard in range(server_config.num_parameter_shards):
        state = checkpoint.read_state(
            str(directory), shard, server_config.num_parameter_shards, server_config.optimizer
        )
        server = ParameterServer(server_config, shard, state=state)
        stack.callback(server.stop)
        servers.append(server.address)
    return servers


@pytest.fixture
def exit_stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after six updates with the target of update 4, and the parameters then."""
    directory = tmp_path / 'checkpoint'
    with serve(_config()) as servers, connect([s.address for s in servers]) as client:
        client.initialise(np.arange(19.0))
        client.pull(agent_steps=24)
        _push(client, _gradients(6))
        client.save(directory)
        with connect([s.address for s in servers]) as reader:
            yield directory, reader.pull().values, reader.pull_target().values


def test_a_directory_of_any_name_can_be_read_again(tmp_path):
    directory = tmp_path / ODD_NAME
    with serve(_config()) as servers, connect([s.address for s in servers]) as client:
        client.initialise(np.arange(19.0))
        client.save(directory)
    np.testing.assert_array_equal(
        checkpoint.read_checkpoint(str(directory)).parameters, np.arange(19.0)
    )


class TestRestore:
    @pytest.mark.parametrize('optimizer', _OPTIMIZERS)
    @pytest.mark.parametrize('num_shards', [1, 2, 3])
    def test_training_goes_on_as_if_never_interrupted(
        self, tmp_path, optimizer, num_shards, exit_stack
    ):
        gradients = _gradients(12)
        with serve(_config(optimizer=optimizer)) as servers:
            with connect([server.address for server in servers]) as client:
                client.initialise(np.arange(19.0))
                _push(client, gradients[:6])
                client.save(tmp_path / 'checkpoint')
                _push(client, gradients[6:])
                with connect([server.address for server in servers]) as reader:
                    expected, target = reader.pull().values, reader.pull_target().values
        restored = _config(optimizer=optimizer, num_parameter_shards=num_shards)
        addresses = _serve_restored(exit_stack, restored, tmp_path / 'checkpoint')
        with connect(addresses) as client:
            _push(client, gradients[6:])
            with connect(addresses) as reader:
                snapshot, again = reader.pull(), reader.pull_target()
        assert snapshot.version == 12
        assert snapshot.target_versions == (12,) * num_shards
        np.testing.assert_allclose(snapshot.values, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(again.values, target, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize('num_shards', [1, 2, 4])
    def test_the_clock_and_the_target_come_back(self, saved, num_shards, exit_stack):
        directory, values, target = saved
        addresses = _serve_restored(exit_stack, _config(num_parameter_shards=num_shards), directory)
        with connect(addresses) as client:
            # Steps of a client the checkpoint has not seen are added to those it has.
            snapshot = client.pull(agent_steps=1)
            assert (snapshot.clock.updates, snapshot.clock.agent_steps) == (6, 25)
            np.testing.assert_array_equal(snapshot.values, values)
            np.testing.assert_array_equal(client.pull_target().values, target)
            assert snapshot.target_versions == (4,) * num_shards

    def test_restored_shards_do_not_take_first_parameters(self, saved, exit_stack):
        directory, values, _ = saved
        with connect(_serve_restored(exit_stack, _config(), directory)) as client:
            assert not client.initialise(np.zeros(19))
            np.testing.assert_array_equal(client.pull().values, values)

    def test_another_optimizer_is_refused(self, saved):
        with pytest.raises(checkpoint.CheckpointMismatchError, match='use --optimizer=adagrad'):
            checkpoint.read_state(str(saved[0]), 0, 2, 'adam')


def test_a_restored_shard_knows_which_workers_were_begun(tmp_path, exit_stack):
    servers = exit_stack.enter_context(serve(_config()))
    client = exit_stack.enter_context(connect([server.address for server in servers]))
    client.initialise(np.zeros(19))
    assert client.enlist('actor', '0') == 0
    client.save(tmp_path / 'checkpoint')
    restored = _serve_restored(exit_stack, _config(), tmp_path / 'checkpoint')
    successor = exit_stack.enter_context(connect(restored))
    assert successor.enlist('actor', '0') == 1
    assert successor.report()['shards'][0]['reruns'] == {'actor': 1}


def test_a_client_goes_on_with_the_restored_shards(tmp_path, exit_stack):
    # The same client before and after: its messages are not taken for repeats, its steps not
    # counted twice.
    servers = [ParameterServer(_config(), shard) for shard in range(2)]
    ports = [server.port for server in servers]
    client = exit_stack.enter_context(connect([server.address for server in servers]))
    client.initialise(np.zeros(19))
    _push(client, _gradients(2))
    client.pull(agent_steps=10)
    client.save(tmp_path / 'c')
    client.push(np.ones(19), 2)
    client.pull(agent_steps=5)
    for connection in client.connections:
        connection.drop()
    for shard, (server, port) in enumerate(zip(servers, ports)):
        server.stop()
        state = checkpoint.read_state(str(tmp_path / 'c'), shard, 2, 'adagrad')
        restored = ParameterServer(_config(), shard, port=port, state=state)
        exit_stack.callback(restored.stop)
    # The restored shards are at update 2; the client has seen update 3, where the clock goes on.
    assert client.push(np.ones(19), 3).rejected is None
    snapshot = client.pull(agent_steps=1)
    assert (snapshot.version, snapshot.clock.updates) == (4, 4)
    # 10 were saved; the client's own count says 16, so the 5 lost ones are made good.
    assert snapshot.clock.agent_steps == 16
    assert client.push(np.ones(19), snapshot.version).rejected is None
    client.close()  # before the servers stop: they wait for their streams


def test_read_checkpoint_gives_the_whole_network(saved):
    directory, values, target = saved
    read = checkpoint.read_checkpoint(str(directory))
    assert read.layout == LAYOUT
    np.testing.assert_array_equal(read.parameters, values)
    np.testing.assert_array_equal(read.target, target)
    np.testing.assert_array_equal(read.average, values)  # these shards keep none
    assert read.clock == {'updates': 6, 'agent_steps': 24}


@pytest.mark.parametrize('num_shards', [1, 2, 3])
def test_a_checkpoint_holds_the_average_and_a_restart_continues_it(
    tmp_path, num_shards, exit_stack
):
    gradients = _gradients(20)
    with serve(_config(average_updates=100)) as servers:
        with connect([server.address for server in servers]) as client:
            client.initialise(np.arange(19.0))
            for name, part in (('10', gradients[:10]), ('12', gradients[10:12])):
                _push(client, part)
                client.save(tmp_path / name)
    restored = _config(average_updates=100, num_parameter_shards=num_shards)
    with connect(_serve_restored(exit_stack, restored, tmp_path / '12')) as client:
        _push(client, gradients[12:])
        client.save(tmp_path / '20')
    read = {name: checkpoint.read_checkpoint(str(tmp_path / name)) for name in ('10', '12', '20')}
    np.testing.assert_array_equal(read['10'].average, read['10'].parameters)
    np.testing.assert_array_equal(read['12'].average, read['10'].parameters)
    np.testing.assert_allclose(
        read['20'].average, (read['10'].parameters + read['20'].parameters) / 2, rtol=1e-6
    )


def test_an_average_of_some_shards_alone_is_none(tmp_path, exit_stack):
    with contextlib.ExitStack() as stack:  # the second has restarted with another setting
        shards = [
            stack.enter_context(ParameterServer(_config(average_updates=window), shard))
            for shard, window in enumerate((100, 0))
        ]
        client = stack.enter_context(connect([shard.address for shard in shards]))
        client.initialise(np.arange(19.0))
        client.save(tmp_path / 'mixed')
    read = checkpoint.read_checkpoint(str(tmp_path / 'mixed'))
    np.testing.assert_array_equal(read.average, read.parameters)
    restored = _serve_restored(exit_stack, _config(average_updates=100), tmp_path / 'mixed')
    with connect(restored) as client:
        client.save(tmp_path / 'whole')
    read = checkpoint.read_checkpoint(str(tmp_path / 'whole'))
    np.testing.assert_array_equal(read.average, np.arange(19.0))


class TestDamage:
    def test_a_sound_checkpoint_is_valid(self, saved):
        assert checkpoint.validate(str(saved[0]))['optimizer'] == 'adagrad'

    @pytest.mark.parametrize('damage', ['missing', 'short', 'changed'])
    def test_a_damaged_file_is_named(self, saved, damage):
        directory = saved[0]
        file = next(directory.glob('shard-00001-of-00002.data*'))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == 'missing':
            file.unlink()
        else:
            file.write_bytes(content if damage == 'changed' else content[:-1])
        with pytest.raises(checkpoint.DamagedCheckpointError, match=file.name):
            checkpoint.validate(str(directory))

    @pytest.mark.parametrize('content', ['', '[]', '{"format": 1, "parts": []}', '{"parts": 3}'])
    def test_a_damaged_manifest_is_named(self, saved, content):
        (saved[0] / 'manifest.json').write_text(content)
        with pytest.raises(checkpoint.DamagedCheckpointError, match='manifest.json is damaged'):
            checkpoint.validate(str(saved[0]))

    def test_an_unfinished_checkpoint_is_none(self, saved):
        (saved[0] / 'manifest.json').unlink()
        with pytest.raises(checkpoint.DamagedCheckpointError, match='manifest.json is missing'):
            checkpoint.read_checkpoint(str(saved[0]))

    def test_a_later_format_is_refused(self, saved):
        path = saved[0] / 'manifest.json'
        later = {**unseal(json.loads(path.read_text())), 'format': 99}
        path.write_text(json.dumps(seal(later)))
        with pytest.raises(checkpoint.DamagedCheckpointError, match='has format 99'):
            checkpoint.validate(str(saved[0]))


class TestSave:
    def test_an_existing_checkpoint_is_not_overwritten(self, saved, exit_stack):
        servers = exit_stack.enter_context(serve(_config()))
        client = exit_stack.enter_context(connect([server.address for server in servers]))
        client.initialise(np.zeros(19))
        with pytest.raises(FileExistsError, match='already holds a checkpoint'):
            client.save(saved[0])

    def test_a_directory_that_cannot_be_written_is_named(self, tmp_path, exit_stack):
        (tmp_path / 'file').write_text('')
        servers = exit_stack.enter_context(serve(_config()))
        client = exit_stack.enter_context(connect([server.address for server in servers]))
        client.initialise(np.zeros(19))
        with pytest.raises(OSError, match='file'):
            client.save(tmp_path / 'file' / 'checkpoint')

    def test_shards_on_other_hosts_send_their_parts(self, tmp_path, exit_stack, monkeypatch):
        monkeypatch.setattr(connection_lib, 'is_loopback', lambda host: False)
        servers = exit_stack.enter_context(serve(_config()))
        client = exit_stack.enter_context(connect([server.address for server in servers]))
        client.initialise(np.arange(19.0))
        _push(client, _gradients(2))
        with sharing.shared_umask():
            client.save(tmp_path / 'checkpoint')
        assert sharing.unshared(tmp_path / 'checkpoint') == []
        found = checkpoint.read_checkpoint(str(tmp_path / 'checkpoint'))
        assert found.clock == {'updates': 2, 'agent_steps': 0}
        with connect([server.address for server in servers]) as reader:
            np.testing.assert_array_equal(found.parameters, reader.pull().values)
            # The stream goes on behind the bytes.
            assert client.push(_gradients(1)[0], reader.pull().version).rejected is None

    def test_shards_without_parameters_have_nothing_to_save(self, tmp_path, exit_stack):
        servers = exit_stack.enter_context(serve(_config()))
        client = exit_stack.enter_context(connect([server.address for server in servers]))
        with pytest.raises(RequestRefusedError, match='initialise first'):
            client.save(tmp_path / 'checkpoint')
        assert not checkpoint.is_published(str(tmp_path / 'checkpoint'))
