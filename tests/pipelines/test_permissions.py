"""Runs of another user: every command ends in one line that names what may not be read or written.

The tests take another user's rights for a moment, which only root may do.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

import pipelines.experiment.builders  # noqa: F401  (now: another user may not read what is imported later)
from pipelines import evaluate, export, mirror, run, servers, stop
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.storage.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason='only root can be another user')

NOBODY = 65534
HOLD = """
import sys
from pipelines.storage.run_directory import RunDirectory
with RunDirectory.open(sys.argv[1], resume=True):
    print('holds', flush=True)
    sys.stdin.read()
"""
RUN_COMMANDS = {
    stop: ('--run_dir={run}',),
    evaluate: ('--run_dir={run}',),
    export: ('--run_dir={run}',),
    mirror: ('--run_dir={run}',),
    run: ('--run_dir={run}', '--resume'),
}
NEW_COMMANDS = {run: '--run_dir={run}/below/it', servers: '--config_dir={run}/below/it'}


@pytest.fixture
def owned() -> Iterator[pathlib.Path]:
    """A run of root's with a checkpoint, where others may look."""
    # Not `tmp_path`, whose parents only their owner may enter.
    with tempfile.TemporaryDirectory() as name:
        pathlib.Path(name).chmod(0o755)
        path = pathlib.Path(name, 'own', 'run')
        with RunDirectory.open(path) as directory:
            experiment = presets.experiment('laptop', {'replay_capacity': 10_000})
            directory.config_file.write_text(config_lib.to_json(experiment))
            with directory.new_checkpoint() as staging:
                (staging / 'run.json').write_text('{}')
        yield path


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """In it this process has another user's rights, over files and over processes."""
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.mark.parametrize(
    ('hidden', 'mode'),
    [
        ('..', 0o700),
        ('.', 0o700),
        ('config.json', 0o600),
        ('.lock', 0o600),
        ('checkpoints', 0o700),
        ('checkpoints/checkpoint-00000001', 0o700),
    ],
)
def test_a_run_that_may_not_be_read_is_one_line_in_every_command(owned, hidden, mode, capsys):
    (owned / hidden).resolve().chmod(mode)
    for command, flags in RUN_COMMANDS.items():
        with another_user():
            code = command.main([flag.format(run=owned) for flag in flags])
        *_, line = capsys.readouterr().err.splitlines()
        assert code == 2
        assert line.startswith(command.__name__.removeprefix('pipelines.') + '.py: ')
        assert str(owned.parent) in line
        assert 'no checkpoint yet' not in line


@pytest.mark.parametrize('hidden', ['.', '..'])
def test_a_place_that_may_not_be_entered_is_one_line(owned, hidden, capsys):
    (owned / hidden).resolve().chmod(0o700)
    for command, flag in NEW_COMMANDS.items():
        with another_user():
            code = command.main([flag.format(run=owned), '--replay_capacity=10000'])
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2
        assert 'cannot be written' in line


def test_another_users_running_run_is_not_stopped_in_one_line(owned, capsys):
    holding = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(owned)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b'holds\n'
        with another_user():
            code = stop.main([f'--run_dir={owned}'])
        assert holding.poll() is None
        holding.communicate()
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert f"cannot signal the run's process {holding.pid} (Operation not permitted)" in line
    assert line.endswith('as its user.')
