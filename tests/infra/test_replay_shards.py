"""Replay shards as processes: start, stop, death and return, limits, checkpoints."""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import portpicker
import psutil
import pytest
import reverb

from infra.replay import dataset as dataset_lib
from infra.replay import server as server_lib
from infra.replay.adder import Adder
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.dataset import piece_size, sample_dataset
from infra.replay.errors import ReplayTimeout, ReplayUnavailable
from infra.replay.server import ShardConfig
from infra.replay.trajectory import FramePart, Steps, TrajectorySpec
from infra.sealed import unseal
from tests.support import memory, sharing
from tests.support.flips import flips_of
from tests.support.replay_shard import ShardProcess
from tests.support.waiting import eventually

SPEC = TrajectorySpec(FramePart((8, 8)), n_step=1)
BATCH_SIZE = 8
FREE = ReplayConfig(
    num_replay_shards=2, replay_capacity=2000, min_replay_size=2, agent_steps_per_update=0.0
)


def step(t, environments=1, value=0):
    """An ordinary agent step; `value` is the action, so that samples can be told apart."""
    steps = Steps(
        frame=np.full((environments, *SPEC.frame.shape), t % 256, np.uint8),
        action=np.full(environments, value, np.int32),
        reward=np.zeros(environments, np.float32),
        discount=np.ones(environments, np.float32),
        first=np.full(environments, t == 0),
    )
    return steps, np.zeros(environments, bool)


def fill(address, steps, value=0):
    """Inserts `steps` agent steps (as many items less n) and confirms them."""
    with Adder(address, SPEC, 1, timeout_seconds=20) as adder:
        for t in range(steps):
            assert adder.add(*step(t, value=value))
        assert adder.flush()


def size_of(address):
    return reverb.Client(address).server_info(timeout=5)[EXPERIENCE_TABLE].current_size


def actions_of(dataset, batches):
    return np.concatenate([next(dataset).transition.action for _ in range(batches)])


def read_only(dataset, value, batches=20, seconds=10):
    """Reads until `batches` in a row come from the shard filled with `value`.

    Of another shard only what was under way may come between them: one piece at its sampler, one
    with its thread, one waiting (infra/replay/dataset.py).
    """
    deadline = time.monotonic() + seconds
    in_a_row = strays = 0
    while in_a_row < batches:
        stray = np.count_nonzero(actions_of(dataset, 1) != value)
        strays += stray
        in_a_row = 0 if stray else in_a_row + 1
        assert strays <= 3 * piece_size(BATCH_SIZE, 2)
        assert time.monotonic() < deadline, f'{in_a_row} batches of {value} in a row'


@contextlib.contextmanager
def shards(directory, config=FREE, count=2, batch_size=BATCH_SIZE):
    """`count` shards, started side by side."""
    shard_config = ShardConfig(config, SPEC, batch_size)
    started = [ShardProcess(shard_config, directory, i) for i in range(count)]
    try:
        yield [process.wait() for process in started]
    finally:
        for process in started:
            if process.process.poll() is None:
                process.close()


class TestServerProcess:
    def test_sigterm_ends_it_whichever_thread_takes_the_signal(self, tmp_path):
        # Right behind SIGCONT the kernel may find the main thread not awake yet.
        with shards(tmp_path, count=1) as (shard,):
            shard.pause()
            assert shard.close() == 0

    def test_sigterm_ends_it_with_exit_code_0_even_with_open_streams(self, tmp_path):
        with shards(tmp_path, count=1) as (shard,):
            fill(shard.address, 10)
            with sample_dataset([shard.address], SPEC, BATCH_SIZE, 0.9) as dataset:
                next(dataset)
                start = time.monotonic()
                assert shard.close() == 0
                assert time.monotonic() - start < 5

    def test_sigint_is_left_to_the_launcher(self, tmp_path):
        with shards(tmp_path, count=1) as (shard,):
            shard.process.send_signal(2)
            time.sleep(0.3)
            fill(shard.address, 5)
            assert shard.process.poll() is None

    def test_a_busy_port_is_one_line_and_exit_code_2(self, tmp_path):
        with socket.socket() as taken:
            taken.bind(('', 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = run_server(tmp_path, '--port', str(port))
        assert result.returncode == 2
        assert result.stderr.strip().splitlines()[-1] == (
            f'replay shard 0 cannot start: port {port} is in use; choose another, or 0 for any'
            ' free one'
        )

    def test_a_missing_checkpoint_is_one_line_and_exit_code_2(self, tmp_path):
        result = run_server(tmp_path, '--restore', str(tmp_path / 'nothing'))
        assert result.returncode == 2
        assert 'nothing holds no complete replay checkpoint' in result.stderr

    def test_only_the_first_shard_holds_the_telemetry(self):
        config = ShardConfig(FREE, SPEC)
        names = [[table.name for table in server_lib.build_tables(config, i)] for i in (0, 1)]
        assert names == [['experience', 'telemetry'], ['experience']]

    def test_a_shard_without_experience_holds_only_telemetry(self):
        config = ShardConfig(FREE, SPEC, experience=False)
        assert [table.name for table in server_lib.build_tables(config, 0)] == ['telemetry']
        with pytest.raises(ValueError, match='neither'):
            server_lib.build_tables(config, 1)


@contextlib.contextmanager
def local_shard(config):
    """The address of a server in this process: starts at once, for what a process is not needed."""
    tables = server_lib.build_tables(ShardConfig(config, SPEC, BATCH_SIZE), 0)
    server = server_lib.start_server(tables)
    try:
        yield f'localhost:{server.port}'
    finally:
        server.stop()


def test_a_server_without_checkpoint_directory_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    with local_shard(FREE) as address:
        assert reverb.Client(address).server_info(timeout=5)
        assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_any_file_of_a_state_is_noticed(tmp_path):
    tables = server_lib.build_tables(ShardConfig(FREE, SPEC, BATCH_SIZE), 0)
    server = server_lib.start_server(tables, checkpoint_dir=str(tmp_path))
    try:
        fill(f'localhost:{server.port}', 11)
        (state,) = server_lib.save([f'localhost:{server.port}'])
    finally:
        server.stop()
    files = [file for file in Path(state).iterdir() if file.stat().st_size]
    assert {'tables.tfrecord', 'chunks.tfrecord', 'SIZES.json'} <= {file.name for file in files}
    for file in files:
        for _ in flips_of(file):
            with pytest.raises(RuntimeError, match='is missing or not what'):
                server_lib.require_whole(state)
    server_lib.require_whole(state)


def test_a_state_of_a_version_that_noted_lengths_alone_is_whole(tmp_path):
    (tmp_path / 'chunks').write_bytes(b'0123')
    (tmp_path / 'SIZES.json').write_text('{"chunks": 4}')
    server_lib.require_whole(str(tmp_path))


def test_a_flipped_bit_in_the_note_of_whose_state_it_is_is_refused_in_one_line(tmp_path):
    options = argparse.Namespace(state_dir=str(tmp_path), shard=0)
    config = ShardConfig(FREE, SPEC)
    server_lib.require_same(options, config)
    note = tmp_path / 'shard.json'
    for _ in flips_of(note):
        try:
            server_lib.require_same(options, config)  # the same to a reader of JSON
        except ValueError as error:
            assert str(note) in str(error)  # noqa: PT017
            assert '\n' not in str(error)  # noqa: PT017
        else:
            assert unseal(json.loads(note.read_bytes()))['shard'] == 0
    assert [file.name for file in tmp_path.iterdir()] == ['shard.json']


def run_server(directory, *options):
    (directory / 'c.json').write_text(json.dumps(config_dict(ShardConfig(FREE, SPEC))))
    command = [sys.executable, '-m', 'infra.replay.server', '--shard', '0']
    command += ['--config', str(directory / 'c.json'), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


def config_dict(config):
    return dataclasses.asdict(config)


class TestShards:
    def test_batches_mix_both_shards_and_name_them(self, tmp_path):
        with shards(tmp_path) as (one, two):
            fill(one.address, 20, value=1)
            fill(two.address, 20, value=2)
            addresses = [one.address, two.address]
            with sample_dataset(addresses, SPEC, BATCH_SIZE, 0.9) as dataset:
                # Pieces of 4 alternate: half of each batch comes from each shard that has one.
                assert piece_size(BATCH_SIZE, 2) == 4
                for _ in range(5):
                    assert eventually(lambda: all(r.piece is not None for r in dataset._readers))
                    sample = next(dataset)
                    np.testing.assert_array_equal(sample.shard + 1, sample.transition.action)
                    assert sorted(sample.shard) == [0] * 4 + [1] * 4
                assert sample.table_size.tolist() == [19] * 8  # 20 steps less n
                np.testing.assert_allclose(sample.probability, 1 / 19)

    def test_a_dead_shard_costs_only_its_share_and_is_taken_back(self, tmp_path):
        with shards(tmp_path) as (one, two):
            addresses = [one.address, two.address]
            fill(one.address, 20, value=1)
            fill(two.address, 20, value=2)
            with sample_dataset(addresses, SPEC, BATCH_SIZE, 0.9, timeout_seconds=60) as dataset:
                next(dataset)
                two.kill()
                read_only(dataset, 1)
                two.restart().wait()
                fill(two.address, 20, value=3)
                deadline = time.monotonic() + 30
                while 3 not in actions_of(dataset, 1):
                    assert time.monotonic() < deadline, 'the shard was not taken back'
                    time.sleep(0.02)

    def test_a_hanging_shard_stops_nobody(self, tmp_path):
        with shards(tmp_path) as (one, two):
            fill(one.address, 20, value=1)
            fill(two.address, 20, value=2)
            addresses = [one.address, two.address]
            with sample_dataset(addresses, SPEC, BATCH_SIZE, 0.9) as dataset:
                next(dataset)
                two.pause()
                read_only(dataset, 1, batches=50)
                two.resume()

    def test_a_shard_that_was_never_there_stops_nobody(self, tmp_path):
        with shards(tmp_path, count=1) as (one,):
            fill(one.address, 20, value=1)
            start = time.monotonic()
            addresses = ['localhost:1', one.address]
            with sample_dataset(addresses, SPEC, BATCH_SIZE, 0.9) as dataset:
                assert set(actions_of(dataset, 5)) == {1}
            assert time.monotonic() - start < 30  # closing does not wait for it either


class TestBounds:
    def test_sampling_too_few_transitions_ends_in_a_timeout(self):
        config = ReplayConfig(replay_capacity=100, min_replay_size=50)
        with local_shard(config) as address:
            fill(address, 11)
            dataset = sample_dataset([address], SPEC, BATCH_SIZE, 0.9, timeout_seconds=1)
            with dataset, pytest.raises(ReplayTimeout, match='holds 10'):
                next(dataset)

    def test_sampling_from_nobody_ends_in_an_error(self):
        dataset = sample_dataset(['localhost:1'], SPEC, BATCH_SIZE, 0.9, timeout_seconds=1)
        with dataset, pytest.raises(ReplayUnavailable, match='localhost:1'):
            next(dataset)

    def test_attempts_at_a_shard_that_refuses_leave_no_thread_behind(self, monkeypatch):
        attempts = []
        monkeypatch.setattr(dataset_lib, '_RETRY_SECONDS', 0.01)
        # No record is kept: it would hold its error, the error its frames.
        logger = logging.getLogger(dataset_lib.__name__)
        monkeypatch.setattr(logger, 'warning', lambda *_: attempts.append(1))
        server = reverb.Server([reverb.Table.queue('another', 1)], port=None)

        def threads_after(count):
            last, deadline = len(attempts) + count, time.monotonic() + 30
            while len(attempts) < last:
                assert time.monotonic() < deadline, 'too few attempts'
                time.sleep(0.01)
            gc.collect()
            return psutil.Process().num_threads()

        with sample_dataset([f'127.0.0.1:{server.port}'], SPEC, BATCH_SIZE, 0.9):
            before = threads_after(10)
            assert threads_after(20) < before + 10  # one lost with each attempt would be 20
        server.stop()

    def test_samples_leave_nothing_behind(self):
        # A tensor that Python saw would be 100 blocks (see infra/array_function.py).
        with local_shard(FREE) as address:
            fill(address, 20, value=1)
            with sample_dataset([address], SPEC, BATCH_SIZE, 0.9) as dataset:
                assert memory.blocks_kept(lambda: next(dataset), 100, few=50) < 50

    def test_a_stop_request_ends_the_wait_for_samples(self):
        dataset = sample_dataset(['localhost:1'], SPEC, BATCH_SIZE, 0.9, should_stop=lambda: True)
        start = time.monotonic()
        with dataset:
            assert list(dataset) == []
        assert time.monotonic() - start < 10

    def test_adding_to_nobody_ends_in_an_error(self):
        with (
            Adder('localhost:1', SPEC, 1, timeout_seconds=1) as adder,
            pytest.raises(ReplayUnavailable, match='localhost:1'),
        ):
            adder.add(*step(0))

    def test_a_closed_limiter_ends_adding_in_a_timeout_and_later_it_goes_on(self):
        # One sample per insert, a tolerance of 16 = two batches: without a learner at most
        # 20 + 16 items get in.
        config = ReplayConfig(
            replay_capacity=1000,
            min_replay_size=20,
            agent_steps_per_update=8.0,
            sample_insert_tolerance=1.0,
        )
        with (
            local_shard(config) as address,
            Adder(address, SPEC, 1, max_in_flight_items=4, timeout_seconds=1) as adder,
        ):
            with pytest.raises(ReplayTimeout, match='waits for its learners'):
                for t in range(200):
                    adder.add(*step(t))
            # In flight at most: 4, or what fits before a chunk is full.
            assert 36 <= adder.items <= 41
            assert size_of(address) == 36
            before = adder.items
            with sample_dataset([address], SPEC, BATCH_SIZE, 0.9) as dataset:
                next(dataset)
                assert adder.add(*step(200))
                assert adder.items == before + 1

    def test_a_wait_for_room_ends_in_time_and_the_next_one_continues_it(self):
        config = ReplayConfig(
            replay_capacity=1000,
            min_replay_size=20,
            agent_steps_per_update=8.0,
            sample_insert_tolerance=1.0,
        )
        with (
            local_shard(config) as address,
            Adder(address, SPEC, 1, max_in_flight_items=4, timeout_seconds=5) as adder,
        ):
            rows = itertools.count()
            while adder.wait_for_room(0.5):
                assert adder.add(*step(next(rows)))
            begun = time.monotonic()
            assert not adder.wait_for_room(0.5)
            assert time.monotonic() - begun < 2.0
            with pytest.raises(ReplayTimeout, match='waits for its learners'):
                while not adder.wait_for_room(0.5):  # five seconds in all
                    assert time.monotonic() - begun < 20.0
            with sample_dataset([address], SPEC, BATCH_SIZE, 0.9) as dataset:
                next(dataset)
                assert adder.add(*step(next(rows)))  # waits itself
                assert adder.flush(10.0)
                assert size_of(address) == next(rows) - SPEC.n_step

    def test_a_stop_request_ends_the_wait_of_an_adder(self):
        config = ReplayConfig(
            replay_capacity=1000,
            min_replay_size=5,
            agent_steps_per_update=8.0,
            sample_insert_tolerance=1.0,
        )
        stop = threading.Event()
        with (
            local_shard(config) as address,
            Adder(address, SPEC, 1, timeout_seconds=60, should_stop=stop.is_set) as adder,
        ):
            threading.Timer(1.0, stop.set).start()
            start = time.monotonic()
            for index in itertools.count():
                if not adder.add(*step(index)):
                    break
                assert time.monotonic() - start < 30
            assert time.monotonic() - start < 10

    @pytest.mark.parametrize('environments', [1, 8, 11])
    def test_what_an_adder_holds_back_is_bounded(self, environments):
        config = ReplayConfig(
            replay_capacity=1000,
            min_replay_size=5,
            agent_steps_per_update=8.0,
            sample_insert_tolerance=1.0,
        )
        with (
            local_shard(config) as address,
            Adder(address, SPEC, environments, timeout_seconds=1) as adder,
        ):
            with pytest.raises(ReplayTimeout):
                for t in range(300):
                    adder.add(*step(t, environments))
            # Reverb warns from 50 unconfirmed items of a writer; 8 environments share one.
            writers = -(-environments // 8)
            assert adder.items - size_of(address) < 50 * writers

    def test_the_ratio_of_samples_to_inserts_is_kept(self):
        config = ReplayConfig(
            replay_capacity=10_000,
            min_replay_size=50,
            agent_steps_per_update=2.0,
            sample_insert_tolerance=32.0,
        )
        with (
            local_shard(config) as address,
            sample_dataset([address], SPEC, BATCH_SIZE, 0.9) as dataset,
        ):
            stop = threading.Event()
            thread = threading.Thread(target=insert_until, args=(stop, address))
            thread.start()
            for _ in range(100):
                next(dataset)
            stop.set()
            thread.join(20)
            info = reverb.Client(address).server_info(timeout=5)[EXPERIENCE_TABLE]
            limiter = info.rate_limiter_info
            inserted, sampled = limiter.insert_stats.completed, limiter.sample_stats.completed
            # Four samples per insert after the first 50, give or take the tolerance; and at most
            # three batches are under way beyond the 100 taken.
            assert abs((inserted - 50) * 4 - sampled) <= 32 + 4
            assert 800 <= sampled <= 800 + 3 * BATCH_SIZE

    @pytest.mark.parametrize('in_flight', [1, 4])
    def test_a_shard_is_asked_for_as_many_batches_as_may_be_in_flight(self, in_flight):
        with (
            local_shard(FREE) as address,
            sample_dataset([address], SPEC, BATCH_SIZE, 0.9, in_flight=in_flight) as dataset,
        ):
            fill(address, 20)
            next(dataset)

            def sampled():
                info = reverb.Client(address).server_info(timeout=5)[EXPERIENCE_TABLE]
                return info.rate_limiter_info.sample_stats.completed / BATCH_SIZE

            # The one taken, one that waits, one that waits to wait, and those in flight.
            assert eventually(lambda: sampled() == 3 + in_flight)
            time.sleep(0.5)
            assert sampled() == 3 + in_flight


def insert_until(stop, address):
    """Inserts until the event `stop` is set."""
    with Adder(address, SPEC, 1, max_in_flight_items=4, should_stop=stop.is_set) as adder:
        t = 0
        while not stop.is_set() and adder.add(*step(t)):
            t += 1


class TestReturningShard:
    def test_an_adder_goes_on_when_its_shard_returns(self, tmp_path):
        with (
            shards(tmp_path, count=1) as (shard,),
            Adder(shard.address, SPEC, 1, timeout_seconds=60) as adder,
        ):
            for t in range(20):
                adder.add(*step(t, value=t))
            assert adder.flush()
            shard.kill()
            shard.restart()
            for t in range(20, 60):
                adder.add(*step(t, value=t))
            shard.wait()
            assert adder.flush(30)
            # Nothing added after the death is lost: the stream goes on where it was.
            assert 40 <= size_of(shard.address) <= 43  # a chunk's rest may be sent twice
            with sample_dataset([shard.address], SPEC, BATCH_SIZE, 0.9) as dataset:
                transition = next(dataset).transition
            # The frame of step t is t everywhere, and so is the action.
            newest = transition.observation[:, 0, 0, -1]
            np.testing.assert_array_equal(newest, transition.action)
            oldest = transition.observation[:, 0, 0, 0]
            np.testing.assert_array_equal(oldest, transition.action - 3)


def newest_of(directory):
    """The newest state of a shard that keeps its own."""
    return server_lib.published_checkpoints(str(directory / 'checkpoints-0'))[0]


def await_another(directory):
    """Waits for a state that is not there yet."""
    before = newest_of(directory)
    assert eventually(lambda: newest_of(directory) != before)


def cut(checkpoint, share):
    """Leaves a share of each of Reverb's own files."""
    for file in Path(checkpoint).glob('*.tfrecord'):
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


class TestCheckpoints:
    def test_items_and_limiter_come_back(self, tmp_path):
        with shards(tmp_path, count=1) as (shard,):
            fill(shard.address, 31, value=7)
            (path,) = server_lib.save([shard.address])
            fill(shard.address, 10, value=8)  # behind the checkpoint: lost
            assert shard.close() == 0
            shard.restart('--restore', path).wait()
            assert size_of(shard.address) == 30
            info = reverb.Client(shard.address).server_info(timeout=5)[EXPERIENCE_TABLE]
            assert info.rate_limiter_info.insert_stats.completed == 30
            with sample_dataset([shard.address], SPEC, BATCH_SIZE, 0.9) as dataset:
                assert set(actions_of(dataset, 10)) == {7}
            fill(shard.address, 6, value=9)
            assert size_of(shard.address) == 35

    def test_a_shard_starts_empty_beside_checkpoints_nobody_asked_for(self, tmp_path):
        with shards(tmp_path, count=1) as (shard,):
            fill(shard.address, 10)
            server_lib.save([shard.address])
            shard.close()
            shard.restart().wait()
            assert size_of(shard.address) == 0

    def test_the_checkpoint_before_is_kept_and_the_one_before_that_is_not(self, tmp_path):
        with sharing.shared_umask(), shards(tmp_path, count=1) as (shard,):
            paths = []
            for _ in range(3):
                fill(shard.address, 5)
                paths += server_lib.save([shard.address])
            assert sharing.unshared(tmp_path / 'checkpoints-0') == []
            assert [os.path.isdir(path) for path in paths] == [False, True, True]
            assert Path(paths[-1]).parent == tmp_path / 'checkpoints-0'

    def test_a_shard_with_a_state_of_its_own_goes_on_from_it(self, tmp_path):
        with ShardProcess(ShardConfig(FREE, SPEC), tmp_path, own_state=True) as shard:
            shard.wait()
            fill(shard.address, 21)
            assert shard.close(signal.SIGHUP) == 0  # its terminal is gone: the state is written
            shard.restart('--state_period_seconds=0.5').wait()
            assert size_of(shard.address) == 20
            fill(shard.address, 6)
            # Two more, since the first may have been begun before the last insert.
            for _ in range(2):
                await_another(tmp_path)
            shard.kill()
            shard.restart().wait()
            assert size_of(shard.address) == 25

    def test_a_damaged_state_gives_way_to_the_one_before_and_then_to_an_empty_shard(self, tmp_path):
        with ShardProcess(ShardConfig(FREE, SPEC), tmp_path, own_state=True) as shard:
            shard.wait()
            for _ in range(2):
                fill(shard.address, 11)
                assert shard.close() == 0
                shard.restart().wait()
            assert size_of(shard.address) == 20
            shard.kill()
            cut(newest_of(tmp_path), 0.0)  # a power cut leaves empty files: Reverb reads no items
            shard.restart().wait()
            assert size_of(shard.address) == 10
            shard.kill()
            cut(newest_of(tmp_path), 0.5)
            shard.restart().wait()
            assert size_of(shard.address) == 0
            assert len(list((tmp_path / 'checkpoints-0').glob('damaged-*'))) == 2

    def test_a_clock_that_is_set_back_makes_no_state_older(self, tmp_path):
        with ShardProcess(ShardConfig(FREE, SPEC), tmp_path, own_state=True) as shard:
            shard.wait()
            fill(shard.address, 11)
            (first,) = server_lib.save([shard.address])
            ahead = Path(first).with_name('00000001-2999-01-01')
            Path(first).rename(ahead)
            (second,) = server_lib.save([shard.address])
            assert server_lib.published_checkpoints(str(ahead.parent)) == [second, str(ahead)]

    def test_a_state_that_cannot_be_written_leaves_no_part_of_it(self, tmp_path, capfd):
        (tmp_path / 'incoming-x' / '2026').mkdir(parents=True)
        nobody = portpicker.pick_unused_port()
        server_lib.keep_state(nobody, str(tmp_path), timeout_seconds=0.5)
        assert 'no state written' in capfd.readouterr().err
        assert list((tmp_path / 'incoming-x').iterdir()) == []

    def test_the_state_of_an_experiment_with_other_values_is_refused(self, tmp_path):
        before = {'shard': 0, **config_dict(ShardConfig(FREE, SPEC, batch_size=7))}
        (tmp_path / 'state').mkdir()
        (tmp_path / 'state' / 'shard.json').write_text(json.dumps(before))
        result = run_server(tmp_path, '--state_dir', str(tmp_path / 'state'))
        assert result.returncode == 2
        assert 'an experiment with other values; empty it' in result.stderr

    def test_two_shards_with_one_state_are_refused(self, tmp_path):
        with ShardProcess(ShardConfig(FREE, SPEC), tmp_path, own_state=True) as shard:
            shard.wait()
            result = run_server(tmp_path, '--state_dir', str(tmp_path / 'checkpoints-0'))
            assert result.returncode == 2
            assert 'in use by process ' in result.stderr

    def test_a_state_and_a_checkpoint_to_start_from_contradict_each_other(self, tmp_path):
        result = run_server(tmp_path, '--state_dir', str(tmp_path), '--restore', str(tmp_path))
        assert result.returncode == 2
        assert '--restore contradicts --state_dir' in result.stderr

    def test_saving_a_dead_shard_is_an_error_that_names_it(self, tmp_path):
        with shards(tmp_path, count=1) as (shard,):
            shard.kill()
            with pytest.raises(ReplayUnavailable, match=shard.address):
                server_lib.save([shard.address], timeout_seconds=5)


@pytest.mark.parametrize(
    ('batch_size', 'num_shards', 'expected'), [(32, 1, 32), (32, 2, 16), (32, 3, 8), (3, 7, 1)]
)
def test_a_piece_is_a_divisor_of_the_batch_within_a_shards_share(batch_size, num_shards, expected):
    assert piece_size(batch_size, num_shards) == expected
