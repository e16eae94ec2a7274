"""Bad input to the main job: one clear line, exit code 2, nothing half-written."""

import os
import socket

import pytest

from pipelines import run


@pytest.fixture
def rejected(tmp_path, capsys):
    """Runs the job with flags that it must refuse; returns the line it says."""

    def check(*flags, run_dir=None):
        directory = tmp_path / 'run' if run_dir is None else run_dir
        before = sorted(tmp_path.rglob('*'))
        assert run.main([f'--run_dir={directory}', *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert sorted(tmp_path.rglob('*')) == before
        return lines[0]

    return check


def test_unknown_game_names_the_nearest(rejected):
    line = rejected('--game=brekout')
    assert 'brekout' in line
    assert 'breakout' in line


def test_unknown_flag_names_the_nearest(rejected):
    assert '--num_actors' in rejected('--num_actor=3')


def test_value_of_the_wrong_type_is_named(rejected):
    assert 'many' in rejected('--num_actors=many')


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (('--num_actors=0',), '--num_actors 0'),
        (('--max_frames=-4',), '--max_frames -4'),
        (('--preset=desktop',), 'laptop'),
        (('--topology=ring',), 'bundled'),
        (('--topology=bundled', '--num_actors=3', '--num_learners=2'), '--num_learners 2'),
        (('--num_replay_shards=3',), '--num_actors'),
        (('--min_replay_size=1000', '--replay_capacity=10'), 'min_replay_size'),
        (('--optimizer=sgd',), 'adam'),
        (('--torso=resnet',), 'nature'),
        (('--loss=l1',), 'huber'),
        (('--batch_size=0',), 'batch_size'),
        (('--n_step=0',), 'n_step'),
        (('--discount=1.5',), 'discount'),
        (('--epsilon_end=2',), 'epsilon_end'),
        (('--learning_rate=-1',), 'learning_rate'),
        (('--envs_per_actor=0',), 'envs_per_actor'),
        (('--parameter_addresses=localhost',), 'host:port'),
        (('--replay_capacity=1000000000',), 'GiB'),
    ],
)
def test_wrong_or_contradictory_value_is_named(rejected, flags, named):
    assert named in rejected(*flags)


def test_used_run_directory_is_refused_and_left_alone(rejected, tmp_path):
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'thesis.tex').write_text('years of work')
    assert str(used) in rejected(run_dir=used)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_unwritable_run_directory_is_named(rejected, tmp_path):
    locked = tmp_path / 'locked'
    locked.mkdir(mode=0o500)
    assert str(locked) in rejected(run_dir=locked / 'run')


def test_run_directory_below_a_file_is_named(rejected, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'file' in rejected(run_dir=tmp_path / 'file' / 'run')


def test_resume_without_a_run_is_refused(rejected, tmp_path):
    assert 'no such run directory' in rejected('--resume', run_dir=tmp_path / 'nothing')


def test_resume_without_run_dir_is_refused(capsys):
    assert run.main(['--resume']) == 2
    assert '--run_dir' in capsys.readouterr().err


def test_unreachable_server_is_named_and_nothing_written(rejected):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # taken, but nobody listens
        address = f'127.0.0.1:{unused.getsockname()[1]}'
        assert address in rejected(f'--parameter_addresses={address}')


def test_busy_port_is_named_and_nothing_written(rejected):
    with socket.socket() as busy:
        busy.bind(('127.0.0.1', 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert str(port) in rejected(f'--replay_ports={port}')


def test_as_many_ports_as_shards_are_needed(rejected):
    assert '2 different ones' in rejected('--num_parameter_shards=2', '--parameter_ports=7001,7001')
