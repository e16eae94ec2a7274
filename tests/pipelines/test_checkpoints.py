"""Checkpoints of a run with real servers: written whole, read back, the damaged one set aside."""

import contextlib
import json
import pathlib

import numpy as np
import pytest

from infra.cluster import PARAMETER_SERVER, REPLAY
from infra.parameter_server import checkpoint as parameter_checkpoint
from pipelines.errors import UsageError
from pipelines.experiment import presets
from pipelines.storage.checkpoints import Checkpoints, read_parameters, readable_counters
from pipelines.storage.run_directory import RunDirectory
from tests.support import parameter_servers
from tests.support.flips import flips_of


@pytest.fixture
def saved(tmp_path):
    """A run directory with two checkpoints, of 1 and of 2 updates; gives it and its checkpoints."""
    config = parameter_servers.config(num_parameter_shards=2)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(tmp_path / 'run'))
        directory.config_file.write_text('{}')
        shards = stack.enter_context(parameter_servers.serve(config))
        client = stack.enter_context(parameter_servers.connect([shard.address for shard in shards]))
        size = client.layout.size
        client.initialise(np.zeros(size, np.float32))
        checkpoints = Checkpoints(directory, presets.experiment('laptop', {}))
        for updates in (1, 2):
            push(client)
            checkpoints.save(client, (), {'updates': updates})
        yield directory, checkpoints, client


def push(client):
    """One more update."""
    assert (
        client.push(np.ones(client.layout.size, np.float32), client.pull().version).rejected is None
    )


def restored_updates(checkpoints):
    """Updates in what a parameter shard would start from."""
    path = checkpoints.restore(PARAMETER_SERVER, 0)
    return parameter_checkpoint.read_checkpoint(str(path)).clock['updates']


def damage(path):
    """Cuts the last bytes off a file of the checkpoint's parameters; returns the file."""
    part = next(path.glob('*.data-*'))
    part.write_bytes(part.read_bytes()[:-8])
    return part


def reopened(directory):
    return Checkpoints(directory, presets.experiment('laptop', {}))


@pytest.fixture
def replay_writes(tmp_path, monkeypatch):
    """Stands in for a replay shard: each save gives a directory with two files, as Reverb does."""

    def save(addresses, timeout_seconds):
        assert addresses == ('replay:1',)
        written = tmp_path / 'written'
        (written / 'tables').mkdir(parents=True)
        (written / 'DONE').write_text('')
        (written / 'tables' / 'chunks').write_bytes(b'0123456789')
        return [str(written)]

    monkeypatch.setattr('infra.replay.server.save', save)


def test_newest_checkpoint_is_restored_with_its_counters(saved):
    directory, _, _ = saved
    checkpoints = reopened(directory)
    assert checkpoints.open(True, print) == {'updates': 2}
    assert restored_updates(checkpoints) == 2
    assert checkpoints.restore(REPLAY, 0) is None  # there was no replay to save


def test_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(saved):
    directory, _, _ = saved
    part = damage(directory.latest_checkpoints()[0] / 'parameters')
    messages: list[str] = []
    checkpoints = reopened(directory)
    assert checkpoints.open(True, messages.append) == {'updates': 1}
    assert messages[0].startswith(f'{part} is damaged (')
    assert messages[0].endswith(
        'bytes instead of 393); renamed to damaged-checkpoint-00000002, trying the one before'
    )
    assert (directory.checkpoints / 'damaged-checkpoint-00000002').is_dir()


def test_a_checkpoint_that_is_not_finite_falls_back_in_one_line(saved, monkeypatch):
    directory, _, client = saved
    parameters = directory.latest_checkpoints()[0] / 'parameters'
    arrays = {name: np.full(client.layout.size, np.nan, np.float32) for name in ('parameters',)}
    counters = {'version': 2, 'target_version': 0, 'agent_steps': 8, 'sessions': {}}
    state = parameter_checkpoint.ShardState(client.layout, arrays, ('parameters',), counters)
    with monkeypatch.context() as earlier:  # versions that wrote whatever they held
        earlier.setattr(parameter_checkpoint, '_require_finite', lambda *_: None)
        part = parameter_checkpoint.write_part(str(parameters), 0, 1, state)
    parameter_checkpoint.publish(str(parameters), 'adam', [part])
    messages: list[str] = []
    checkpoints = reopened(directory)
    assert checkpoints.open(True, messages.append) == {'updates': 1}
    assert 'parameters of shard-00000-of-00001 is not finite' in messages[0]
    assert '\n' not in messages[0]
    assert restored_updates(checkpoints) == 1


def test_no_readable_checkpoint_is_a_usage_error(saved):
    directory, _, _ = saved
    for path in directory.latest_checkpoints():
        (path / 'parameters' / 'manifest.json').unlink()
    with pytest.raises(UsageError, match='no checkpoint can be read'):
        readable_counters(directory)
    assert len(directory.latest_checkpoints()) == 2  # asking changes nothing
    with pytest.raises(UsageError, match='no checkpoint can be read'):
        reopened(directory).open(True, print)


def test_only_the_newest_two_are_kept(saved):
    directory, _, _ = saved
    with directory.new_checkpoint() as staging:
        (staging / 'run.json').write_text('{}')
    directory.prune(2)
    names = [path.name for path in directory.latest_checkpoints()]
    assert names == ['checkpoint-00000003', 'checkpoint-00000002']


@pytest.mark.parametrize(
    'content',
    [
        '{}',
        '{"updates": "2", "replay_files": {}}',
        '{"updates": -2, "replay_files": {}}',
        '{"updates": 2, "submissions": [], "replay_files": {}}',
        '[' * 100_000,
        'no JSON',
    ],
    ids=lambda content: content[:40],
)
def test_run_file_without_updates_falls_back(saved, content):
    directory, _, _ = saved
    (directory.latest_checkpoints()[0] / 'run.json').write_text(content)
    messages: list[str] = []
    assert reopened(directory).open(True, messages.append) == {'updates': 1}
    assert 'run.json is damaged' in messages[0]


def test_replay_files_are_recorded_and_restored(saved, replay_writes):
    directory, checkpoints, client = saved
    checkpoints.save(client, ('replay:1',), {'updates': 2})
    newest = directory.latest_checkpoints()[0]
    recorded = json.loads((newest / 'run.json').read_text())['replay_files']
    # Bytes and CRC-32; the second as `gzip -c chunks | tail -c8` tells it.
    assert recorded == {'shard-0/DONE': [0, 0], 'shard-0/tables/chunks': [10, 2793719750]}
    again = reopened(directory)
    assert again.open(True, print) == {'updates': 2}
    assert again.restore(REPLAY, 0) == newest / 'replay' / 'shard-0'


@pytest.mark.parametrize('harm', ['cut', 'changed', 'missing', 'added'])
def test_damaged_replay_falls_back_to_the_checkpoint_before(saved, replay_writes, harm):
    directory, checkpoints, client = saved
    checkpoints.save(client, ('replay:1',), {'updates': 3})
    chunks = directory.latest_checkpoints()[0] / 'replay' / 'shard-0' / 'tables' / 'chunks'
    if harm == 'cut':
        chunks.write_bytes(b'01234')
    elif harm == 'changed':
        chunks.write_bytes(b'9876543210')  # as long as before
    elif harm == 'missing':
        chunks.unlink()
    else:
        chunks.with_name('more').write_bytes(b'0')
    messages: list[str] = []
    assert reopened(directory).open(True, messages.append) == {'updates': 2}
    assert 'shard-0/tables' in messages[0]


@pytest.mark.parametrize('kind', ['run.json', 'chunks', '*00000-of-*.data-*', 'manifest.json'])
def test_a_flipped_bit_in_any_file_falls_back_in_one_line(saved, replay_writes, kind):
    directory, checkpoints, client = saved
    checkpoints.save(client, ('replay:1',), {'updates': 3, 'agent_steps': 12})
    newest = directory.latest_checkpoints()[0]
    (file,) = newest.rglob(kind)
    for _ in flips_of(file):
        messages: list[str] = []
        counters = reopened(directory).open(True, messages.append)
        assert '\n' not in ''.join(messages)
        if newest.exists():  # the same to a reader of JSON
            assert counters == {'updates': 3, 'agent_steps': 12}
            assert len(messages) == 1
        else:
            assert counters == {'updates': 2}
            assert newest.name in messages[0]
            directory.path.joinpath('checkpoints', f'damaged-{newest.name}').rename(newest)


def test_parameters_go_on_without_a_replay_when_no_checkpoint_is_whole(saved, replay_writes):
    directory, checkpoints, client = saved
    checkpoints.save(client, ('replay:1',), {'updates': 3})
    for older in directory.latest_checkpoints()[1:]:
        damage(older / 'parameters')
    (newest,) = (directory.latest_checkpoints()[0],)
    (newest / 'replay' / 'shard-0' / 'tables' / 'chunks').write_bytes(b'01234')
    messages: list[str] = []
    checkpoints = reopened(directory)
    assert checkpoints.open(True, messages.append) == {'updates': 3}
    assert 'resuming with an empty one' in messages[0]
    assert checkpoints.restore(PARAMETER_SERVER, 0) == newest / 'parameters'
    assert checkpoints.restore(REPLAY, 0) is None


def test_replay_of_others_is_not_saved(saved, replay_writes):
    directory, _, client = saved
    theirs = Checkpoints(directory, presets.experiment('laptop', {}), replay_is_ours=False)
    theirs.save(client, ('replay:1',), {'updates': 2})
    assert not (directory.latest_checkpoints()[0] / 'replay').exists()


class TestSaveParameters:
    def test_a_shard_starts_from_the_newest_of_both_kinds(self, saved):
        _, checkpoints, client = saved
        push(client)
        checkpoints.save_parameters(client)
        assert restored_updates(checkpoints) == 3
        assert pathlib.Path(checkpoints.restore(PARAMETER_SERVER, 0)).name == 'parameters-00000001'
        push(client)
        checkpoints.save(client, (), {'updates': 4})
        assert restored_updates(checkpoints) == 4

    def test_before_any_full_checkpoint(self, saved):
        directory, _, client = saved
        checkpoints = reopened(directory)
        assert checkpoints.restore(PARAMETER_SERVER, 0) is None
        checkpoints.save_parameters(client)
        assert restored_updates(checkpoints) == 2
        assert checkpoints.restore(REPLAY, 0) is None

    def test_the_newest_two_are_kept_across_sessions(self, saved):
        directory, checkpoints, client = saved
        for _ in range(2):
            checkpoints.save_parameters(client)
        reopened(directory).save_parameters(client)
        names = sorted(path.name for path in (directory.path / 'servers').iterdir())
        assert names == ['parameters-00000002', 'parameters-00000003']

    def test_resume_takes_the_full_checkpoint(self, saved):
        directory, checkpoints, client = saved
        push(client)
        checkpoints.save_parameters(client)
        again = reopened(directory)
        assert again.open(True, print) == {'updates': 2}
        assert restored_updates(again) == 2

    def test_damaged_one_falls_back(self, saved):
        _, checkpoints, client = saved
        push(client)
        checkpoints.save_parameters(client)
        damage(checkpoints.restore(PARAMETER_SERVER, 0))
        assert restored_updates(checkpoints) == 2

    def test_failure_leaves_nothing_and_the_one_before_in_force(self, saved, monkeypatch):
        directory, checkpoints, client = saved

        def fail(path):
            pathlib.Path(path).mkdir()
            raise OSError('disk full')

        monkeypatch.setattr(client, 'save', fail)
        with pytest.raises(OSError, match='disk full'):
            checkpoints.save_parameters(client)
        assert list((directory.path / 'servers').iterdir()) == []
        assert restored_updates(checkpoints) == 2


def test_parameters_are_read_from_the_newest_that_can_be(saved):
    directory, _, _ = saved
    messages: list[str] = []
    assert read_parameters(directory, 'newest', messages.append)[1].clock['updates'] == 2
    assert messages == []
    damage(directory.latest_checkpoints()[0] / 'parameters')
    assert read_parameters(directory, 'newest', messages.append)[1].clock['updates'] == 1
    (line,) = messages
    assert line.endswith('bytes instead of 393); skipped')
    assert len(directory.latest_checkpoints()) == 2  # the run may be going on: nothing is moved
