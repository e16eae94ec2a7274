"""A parameter shard that keeps its own state, and goes on from it when it is started again."""

import contextlib
import os
import pathlib
import signal

import numpy as np
import pytest

from infra.parameter_server import checkpoint
from infra.parameter_server.protocol import ParameterServerUnavailable
from infra.parameter_server.server import ParameterServer
from infra.parameter_server.state_directory import OwnState
from tests.support.flips import flips_of
from tests.support.names import UNFIT_NAMES
from tests.support.parameter_servers import LAYOUT, ShardProcess, config, connect
from tests.support.waiting import eventually

ONE = config(num_parameter_shards=1)
PLACE = (0, 1, 'adagrad')


def push(client, count):
    """Applies gradients of ones: with this configuration parameters move by -1 each."""
    for _ in range(count):
        assert client.push(np.ones(LAYOUT.size), client.pull().version).rejected is None


def state_files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in directory.rglob('*.data-*') if file.is_file())


def updates_in(directory: pathlib.Path) -> int:
    """Updates in the newest state that a shard, which runs, has written."""
    names = sorted(path.name for path in directory.glob('state-*'))
    with contextlib.suppress(checkpoint.DamagedCheckpointError, OSError, IndexError):
        return checkpoint.read_only_part(str(directory / names[-1]), *PLACE).counters['version']
    return 0


@pytest.fixture
def saved(tmp_path):
    """A directory with the states after 1 and after 3 updates."""
    with ParameterServer(ONE, 0, own_state=OwnState(str(tmp_path), *PLACE)) as server:
        with connect([server.address]) as client:
            client.initialise(np.zeros(LAYOUT.size))
            client.claim('runs/first')
            push(client, 1)
            server.keep_state()
            push(client, 2)
            server.keep_state()
    return tmp_path


def restored(directory) -> ParameterServer:
    return ParameterServer(ONE, 0, own_state=OwnState(str(directory), *PLACE))


def test_a_shard_goes_on_from_its_newest_state_and_still_belongs_to_its_run(saved):
    with restored(saved) as server, connect([server.address]) as client:
        report = client.report()['shards'][0]
        assert (report['version'], report['owner']) == (3, 'runs/first')
        np.testing.assert_allclose(client.pull().values, -3.0, rtol=1e-5)


def test_the_newest_two_states_are_kept(saved):
    with restored(saved) as server:
        server.keep_state()
    assert sorted(path.name for path in saved.glob('s*')) == ['state-00000002', 'state-00000003']


def test_a_damaged_state_gives_way_to_the_one_before(saved):
    state_files(saved)[-1].write_bytes(b'nonsense')
    with restored(saved) as server:
        assert server.shard.clock()['version'] == 1


@pytest.mark.parametrize('kind', ['manifest.json', '*.index', '*.data-*'])
def test_a_flipped_bit_in_any_file_of_the_newest_state_gives_way_to_the_one_before(
    saved, kind, caplog
):
    own = OwnState(str(saved), *PLACE)
    newest, aside = saved / 'state-00000002', saved / 'damaged-state-00000002'
    (file,) = newest.glob(kind)
    whole = checkpoint.read_only_part(str(newest), *PLACE).counters
    for _ in flips_of(file):
        caplog.clear()
        state = own.newest()
        assert state is not None
        if aside.exists():
            assert state.counters['version'] == 1
            assert len(caplog.messages) == 1
            assert '\n' not in caplog.text.strip()
            aside.rename(newest)
        else:  # the same to a reader of JSON, such as other white space
            assert state.counters == whole
    own.close()


def test_a_half_written_state_is_removed(saved):
    (saved / 'state-00000003').mkdir()
    with restored(saved) as server:
        assert server.shard.clock()['version'] == 3
    assert not (saved / 'state-00000003').exists()


def test_a_shard_whose_states_are_all_damaged_does_not_start_empty(saved):
    for file in state_files(saved):
        file.write_bytes(b'nonsense')
    for _ in range(2):  # a supervisor starts it again
        own = OwnState(str(saved), *PLACE)
        with pytest.raises(checkpoint.DamagedCheckpointError, match='remove these to start empty'):
            own.newest()
        own.close()


@pytest.mark.parametrize(
    ('place', 'message'),
    [((1, 2, 'adagrad'), 'its own directory'), ((0, 1, 'adam'), 'use --optimizer=adagrad')],
)
def test_a_state_of_another_shard_or_optimizer_is_refused(saved, place, message):
    own = OwnState(str(saved), *place)
    with pytest.raises(checkpoint.CheckpointMismatchError, match=message):
        own.newest()
    own.close()


@pytest.mark.parametrize('name', UNFIT_NAMES)
def test_a_directory_of_an_unfit_name_is_refused_and_not_made(tmp_path, name):
    with pytest.raises(OSError, match=UNFIT_NAMES[name]):
        OwnState(str(tmp_path / name), *PLACE)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_process_has_is_refused(saved):
    with restored(saved):
        with pytest.raises(OSError, match=f'in use by process {os.getpid()}'):
            OwnState(str(saved), *PLACE)


def test_a_damaged_state_does_not_push_out_a_sound_one(saved):
    state_files(saved)[-1].write_bytes(b'nonsense')
    with restored(saved) as server:
        server.keep_state()
    # The state after 1 update is still there beside the one just written.
    state_files(saved)[-1].write_bytes(b'nonsense')
    with restored(saved) as server:
        assert server.shard.clock()['version'] == 1


def test_a_shard_told_to_stop_still_is_when_it_is_back(saved):
    with restored(saved) as server:
        server.shard.control.request_stop()
        server.keep_state()
    with restored(saved) as server:
        assert server.shard.clock()['stopping']
        server.shard.control.claim('runs/first')
        assert not server.shard.clock()['stopping']


def test_nothing_is_answered_behind_the_last_state(saved):
    with restored(saved) as server, connect([server.address], timeout_seconds=1.0) as client:
        client.pull()
        server.keep_state(last=True)
        with pytest.raises(ParameterServerUnavailable):
            client.push(np.ones(LAYOUT.size), 3)
        server.shard._lock.release()  # the test's own end


def test_a_shard_without_parameters_keeps_no_state(tmp_path):
    with restored(tmp_path) as server:
        server.keep_state()
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


class TestProcess:
    def test_sighup_and_sigkill_leave_a_state_to_go_on_from(self, tmp_path):
        own = (f'--state_dir={tmp_path / "state"}', '--state_period_seconds=0.5')
        with ShardProcess(tmp_path, ONE, 0, *own) as shard:
            shard.wait_ready()
            with connect([shard.address], timeout_seconds=90.0) as client:
                client.initialise(np.zeros(LAYOUT.size))
                push(client, 4)
                shard.process.send_signal(signal.SIGHUP)  # as when its terminal goes away
                assert shard.process.wait(20) == 0
                shard.start(*own)
                assert client.pull().clock.updates == 4
                push(client, 1)
                # Periods of half a second: the fifth update is in a state soon.
                assert eventually(lambda: updates_in(tmp_path / 'state') == 5, 20.0)
                shard.kill()
                shard.start(*own)
                assert client.pull().clock.updates == 5

    def test_a_damaged_state_is_one_line_and_exit_code_2(self, saved, tmp_path_factory):
        for file in state_files(saved):
            file.write_bytes(b'nonsense')
        directory = tmp_path_factory.mktemp('shard')
        with ShardProcess(directory, ONE, 0, f'--state_dir={saved}') as shard:
            code, text = shard.wait_failed()
        assert code == 2
        assert 'is damaged' in text

    def test_a_period_that_is_none_is_refused(self, tmp_path):
        options = (f'--state_dir={tmp_path / "s"}', '--state_period_seconds=0')
        with ShardProcess(tmp_path, ONE, 0, *options) as shard:
            code, text = shard.wait_failed()
        assert code == 2
        assert 'is not a positive number' in text
