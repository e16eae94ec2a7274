"""Bad input to the main job: one clear line, exit code 2, nothing half-written."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from pipelines import evaluate, export, mirror, run, stop
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


@pytest.fixture
def run_dir(tmp_path):
    """The directory of a run without checkpoints."""
    experiment = presets.experiment('laptop', {'replay_capacity': 10_000})
    directory = tmp_path / 'run'
    directory.mkdir()
    (directory / 'config.json').write_text(config_lib.to_json(experiment))
    return directory


BUNDLED = ('--topology=bundled', '--num_actors=2', '--num_learners=2')
RUN_COMMANDS = ((run, '--resume'), (evaluate,), (export,))


def test_unknown_game_names_the_nearest(rejected):
    line = rejected('--game=brekout')
    assert 'brekout' in line
    assert 'breakout' in line


def test_a_game_that_would_end_the_interpreter_is_refused_at_the_door(rejected):
    assert "game 'Maze-Craze' cannot be played" in rejected('--game=Maze-Craze')


def test_unknown_flag_names_the_nearest(rejected):
    assert '--num_actors' in rejected('--num_actor=3')


def test_value_of_the_wrong_type_is_named(rejected):
    assert 'many' in rejected('--num_actors=many')


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (
            ('--num_actors=0',),
            '--num_actors 0: must be at least 1. Fix: correct the value, or omit',
        ),
        (('--num_actors=',), "'' is not a 64-bit integer. Fix: see --help."),
        (('--learning_rate=',), "invalid float value: ''. Fix: see --help."),
        (('--max_frames=-4',), '--max_frames -4'),
        (('--preset=desktop',), 'laptop'),
        (('--preset=',), "--preset '': unknown. Fix: choose one of laptop, "),
        (('--topology=ring',), 'bundled'),
        (('--evaluation_protocol=human',), 'then run `pipelines/evaluate.py --protocol human'),
        (('--evaluation_episodes=1e14',), '--evaluation_episodes 100000000000000: must be from 1'),
        (('--topology=bundled', '--num_actors=3', '--num_learners=2'), '--num_learners 2'),
        (('--num_replay_shards=3',), '--num_actors'),
        (('--min_replay_size=1000', '--replay_capacity=10'), '--min_replay_size'),
        (('--max_frames=20000', '--min_replay_size=5000'), '--min_replay_size 5000'),
        (('--optimizer=sgd',), 'adam'),
        (('--optimizer=adam', '--optimizer_epsilon=0'), '--optimizer_epsilon 0.0: must be '),
        (('--torso=resnet',), 'nature'),
        (('--screen_size=35',), 'from 36 to 210'),
        (('--center_input',), '--no-standardize_input'),
        (('--learning_rate=0.00005',), '--learning_rate_updates 0'),
        (
            ('--preset=nature', '--learning_rate_end=0.0001'),
            '--learning_rate_updates above 0',
        ),
        (('--loss=l1',), 'huber'),
        (('--batch_size=0',), '--batch_size'),
        (('--n_step=0',), '--n_step'),
        (('--discount=1.5',), '--discount'),
        (('--epsilon_end=2',), '--epsilon_end'),
        (('--negative_slope=2',), '--negative_slope 2.0: must be from 0 to 1'),
        (('--learning_rate=-1',), '--learning_rate'),
        (('--learning_rate=inf',), '--learning_rate inf: must be a finite number'),
        (('--gradient_clip_norm=nan',), '--gradient_clip_norm nan: must be a finite number'),
        (('--envs_per_actor=0',), '--envs_per_actor'),
        (('--parameter_addresses=localhost',), 'host:port'),
        (('--parameter_addresses=127.0.0.1:99999',), '65535'),
        (('--parameter_ports=²',), '65535'),
        (('--parameter_ports=47001,47002', '--replay_ports=47001'), 'both contain 47001'),
        (
            ('--num_parameter_shards=2', '--parameter_ports=47001,47001,47002'),
            '2 different ones',
        ),
        (('--checkpoint_period_seconds=nan',), '--checkpoint_period_seconds nan: must be '),
        (('--seed=18446744073709551616',), "--seed: '18446744073709551616' is not a 64-bit"),
        (('--worker_threads=99999999999999999999',), '--worker_threads'),
        (('--frame_stack=100000',), '--frame_stack'),
        (('--envs_per_actor=1000000',), '--envs_per_actor'),
        (('--batch_size=1000000000',), '--batch_size'),
        (('--replay_capacity=1000000000',), 'GiB'),
        (('--num_atoms=51',), '--agent c51'),
        (('--num_fractions=8',), '--agent iqn'),
        (('--agent=iqn', '--num_quantiles=9'), '--agent qr_dqn'),
        (('--agent=iqn', '--num_cosines=0'), '--num_cosines 0'),
        (('--munchausen',), '--munchausen --double_dqn'),
        (('--preset=nature', '--munchausen', '--agent=c51'), '--munchausen --agent c51'),
        (('--munchausen_scale=0.5',), '--munchausen'),
        (('--munchausen_temperature=0',), '--munchausen_temperature 0'),
        (('--munchausen_lowest=1',), '--munchausen_lowest 1'),
        (('--agent=c51', '--loss=squared'), '--agent dqn'),
        (('--num_quantiles=9', '--agent=dqn'), '--agent qr_dqn'),
        (('--preset=apex', '--epsilon_updates=9'), '--no-epsilon_ladder'),
        (('--ladder_epsilon=0.1',), '--epsilon_ladder'),
        (('--bundle_replay=servers',), '--topology bundled'),
        (('--bundle_replay=all',), "'all'"),
        (('--learning_rate=-1',), '--learning_rate -1.0: must be more than 0'),
        (
            (*BUNDLED, '--bundle_replay=servers', '--replay_mode=local'),
            'Fix: make them equal',
        ),
        ((*BUNDLED, '--replay_mode=local'), '--topology separate or --bundle_replay servers'),
        (('--preset=nature', '--importance_updates=9'), '--priority_exponent'),
        (('--optimizer=adagrad', '--adam_beta_1=0.5'), '--optimizer adam'),
        (
            ('--max_staleness=0',),
            'up to 1 update(s) old with --overlap_push --pushes_in_flight 1. ',
        ),
        # Computed while 4 pushes are under way; the 3 sent after it may arrive before it.
        (('--max_staleness=6', '--pushes_in_flight=4'), '7 update(s) old with --overlap_push '),
        # 100 updates without a pull, and the push under way.
        (
            ('--learner_pull_period=101',),
            '101 update(s) old with --learner_pull_period 101 and --o',
        ),
        (('--learner_pull_period=102', '--no-overlap_push'), 'learners, or lower the other(s).'),
        (('--direct_num_workers=3',), 'reserved, since the number of workers determines it'),
        (('--direct_running_mode', 'in_memory'), '--direct_running_mode'),
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


def test_empty_run_dir_is_refused(capsys):
    assert run.main(['--run_dir=']) == 2
    assert '--run_dir: empty' in capsys.readouterr().err


def test_unreachable_server_is_named_and_nothing_written(rejected):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # taken, but nobody listens
        address = f'127.0.0.1:{unused.getsockname()[1]}'
        assert address in rejected(f'--parameter_addresses={address}')


@pytest.mark.parametrize('kind', ['parameter', 'replay'])
def test_a_server_of_another_kind_is_named_and_nothing_written(rejected, kind):
    silent = socket.create_server(('127.0.0.1', 0))  # listens, and says nothing
    with silent:
        address = f'127.0.0.1:{silent.getsockname()[1]}'
        line = rejected(f'--{kind}_addresses={address}')
    assert address in line
    assert f'not as a {kind} shard' in line


def test_busy_port_is_named_and_nothing_written(rejected):
    with socket.socket() as busy:
        busy.bind(('127.0.0.1', 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert str(port) in rejected(f'--replay_ports={port}')


def test_as_many_ports_as_shards_are_needed(rejected):
    assert '2 different ones' in rejected('--num_parameter_shards=2', '--parameter_ports=7001,7001')


@pytest.mark.parametrize('kind', ['parameter', 'replay'])
def test_resume_with_servers_of_one_kind_alone_is_refused(rejected, kind):
    message = rejected('--resume', f'--{kind}_addresses=localhost:1')
    assert f'--{kind}_addresses: contradicts --resume' in message


@pytest.mark.parametrize('command', RUN_COMMANDS)
def test_a_run_without_a_checkpoint_is_refused_and_left_alone(run_dir, capsys, command):
    before = (run_dir / 'config.json').read_text()
    main, flags = command[0].main, command[1:]
    assert main([f'--run_dir={run_dir}', *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ': no checkpoint yet. Fix: ' in line
    assert line.endswith(' --checkpoint_period_seconds.')
    assert (run_dir / 'config.json').read_text() == before


def test_configuration_that_cannot_be_written_is_one_line(rejected, monkeypatch, tmp_path):
    def fail(path, content):
        raise OSError(28, 'No space left on device', f'{path.parent}/.config.json.0123456789ab')

    monkeypatch.setattr(run, 'write_atomically', fail)
    assert rejected('--replay_capacity=10000') == (
        f'run.py: {tmp_path / "run"}: cannot be written (No space left on device). Fix: free some'
        ' disk space.'
    )


@pytest.mark.parametrize('command', RUN_COMMANDS)
def test_a_file_in_place_of_the_checkpoints_is_one_line(run_dir, capsys, command):
    (run_dir / 'checkpoints').write_text('')
    main, flags = command[0].main, command[1:]
    assert main([f'--run_dir={run_dir}', *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f': {run_dir}/checkpoints: not a directory. Fix: ' in line


@pytest.mark.parametrize('command', RUN_COMMANDS)
def test_a_configuration_that_cannot_be_read_is_named_once_with_a_remedy(run_dir, capsys, command):
    (run_dir / 'config.json').unlink()
    (run_dir / 'config.json').mkdir()
    main, flags = command[0].main, command[1:]
    assert main([f'--run_dir={run_dir}', *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    remedy = 'put the file back, or remove the directory'
    assert line.endswith(f'.py: {run_dir}/config.json: not a file. Fix: {remedy}.')


EMPTY = ('game', 'runner', 'host', 'run_dir', 'work_dir', 'topology', 'learner_device')
LISTS = ('parameter_addresses', 'replay_addresses', 'parameter_ports', 'replay_ports')


@pytest.mark.parametrize(
    'flag',
    [
        *(f'--{name}=' for name in (*EMPTY, *LISTS, 'tls_certificate', 'tls_key', 'tls_roots')),
        *(f'--{name}=,' for name in LISTS),
    ],
)
def test_an_empty_value_never_means_the_default(rejected, flag):
    assert f'{flag.split("=")[0]}: empty. Fix: ' in rejected(flag)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_the_start_ends_without_a_trace(tmp_path, number):
    directory = tmp_path / 'runs' / 'run'
    # The launcher is imported behind this line.
    job = subprocess.Popen(
        [sys.executable, 'pipelines/run.py', f'--run_dir={directory}', '--replay_capacity=10000'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline().startswith('run directory')
    job.send_signal(number)
    said, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (128 + number, '')
    assert f'{number.name}: stopped before anything was started' in said
    assert list(tmp_path.iterdir()) == []


def test_signal_while_modules_are_imported_is_no_traceback(tmp_path):
    job = subprocess.Popen(
        [sys.executable, 'pipelines/run.py', f'--run_dir={tmp_path / "run"}'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    status = pathlib.Path(f'/proc/{job.pid}/status')
    deadline = time.monotonic() + 60
    while not _catches(status.read_text(), signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    said = 'run.py: SIGINT: stopped before anything was started\n'
    assert job.communicate(timeout=60) == (said, '')
    assert job.returncode == 130


def _catches(status: str, number: int) -> bool:
    """Whether a process has a handler of its own; `status` as in /proc/<pid>/status."""
    mask = next(line for line in status.splitlines() if line.startswith('SigCgt:'))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    'flag',
    [
        '--episodes=0',
        '--episodes=1e14',
        '--epsilon=1.5',
        '--epsilon=-1',
        '--epsilon=nan',
        '--seed=-1',
    ],
)
def test_wrong_value_for_the_evaluation_is_one_line_before_any_run_is_asked(tmp_path, capsys, flag):
    assert evaluate.main([f'--run_dir={tmp_path / "no_run"}', flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f'evaluate.py: {flag.split("=")[0]} ')


@pytest.mark.parametrize(
    ('command', 'flag'),
    [
        *((command, '--run_dir') for command in (evaluate, export, mirror, stop)),
        *((command, '--output') for command in (evaluate, export)),
    ],
)
def test_an_empty_path_is_refused_by_its_flag(tmp_path, capsys, command, flag):
    with pytest.raises(SystemExit) as refusal:
        command.main([f'--run_dir={tmp_path}', f'{flag}='])
    assert refusal.value.code == 2
    assert capsys.readouterr().err.endswith(f'{flag}: empty. Fix: name a path.\n')
