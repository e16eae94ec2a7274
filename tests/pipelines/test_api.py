"""The Python door: experiments as the command line makes them, errors as it tells them."""

import pathlib
import signal
import subprocess
import sys

import psutil
import pytest

from pipelines import api
from pipelines.experiment import command_line, presets
from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    'experiment',
    [
        api.experiment(),
        api.experiment('rainbow_lite', game='breakout', seed=3, learning_rate=2.5e-5),
        api.experiment('paper', shared_memory=False, overlap_push=False, max_frames=10**9),
        api.experiment('classic', game='CartPole-v1', max_frames=20_000),
    ],
    ids=lambda experiment: experiment.preset,
)
@pytest.mark.parametrize('resume', [False, True])
def test_the_flags_of_an_experiment_make_the_same_one(experiment, resume):
    _, preset, values = command_line.parse([*api._settings(experiment, resume)])
    assert presets.experiment(preset or '', values) == experiment
    if not resume:
        assert command_line.experiment(preset, values) == experiment  # nothing lacks an effect


@pytest.mark.parametrize(
    ('preset', 'settings', 'told'),
    [
        ('laptop', {'nosuch': 1}, 'nosuch: unknown setting'),
        ('nosuch', {}, 'nosuch'),
        ('', {}, "--preset '': unknown"),
        ('laptop', {'game': ''}, "'': no name. Fix: name a game, such as pong"),
        ('laptop', {'learning_rate': float('inf')}, '--learning_rate inf: must be a finite'),
        ('laptop', {'num_atoms': 11}, '--num_atoms'),
        ('laptop', {'num_actors': '2'}, "--num_actors '2': must be of type int"),
        ('laptop', {'num_actors': 2.0}, '--num_actors 2.0: must be of type int'),
        ('laptop', {'shared_memory': 'no'}, "shared_memory 'no': must be of type bool"),
        ('laptop', {'seed': True}, '--seed True: must be of type int'),
        ('laptop', {'max_frames': 10**400}, 'must be a 64-bit integer'),
        ('laptop', {'game': 5}, 'game 5: must be of type str'),
        ('laptop', {'game': 'nosuch'}, "unknown game 'nosuch'"),
    ],
)
def test_a_wrong_setting_is_told_as_the_command_line_tells_it(preset, settings, told):
    with pytest.raises(api.UsageError, match=told):
        api.experiment(preset, **settings)


@pytest.mark.parametrize(('run_dir', 'output'), [('', None), ('runs/a', '')])
def test_an_empty_path_is_no_default(run_dir, output):
    with pytest.raises(api.UsageError, match=': empty. Fix: name a path.'):
        api.evaluate(run_dir, output=output)


def test_a_game_is_named_as_on_the_command_line():
    assert api.experiment(game='ALE/Breakout-v5').environment.game == 'breakout'


def test_what_run_py_refuses_is_raised_in_its_words(tmp_path):
    (tmp_path / 'mine').touch()
    lines: list[str] = []
    with pytest.raises(api.UsageError, match=f'^{tmp_path}: not an empty directory. Fix: choose'):
        api.train(api.experiment(), tmp_path, progress=lines.append)
    assert lines
    with pytest.raises(api.UsageError, match='pass an experiment'):
        api.train(None, tmp_path)


def test_what_evaluate_py_refuses_is_raised_in_its_words(tmp_path):
    with pytest.raises(api.UsageError, match=r'^--epsilon 2.0: must be from 0 to 1'):
        api.evaluate(tmp_path, epsilon=2.0)
    with pytest.raises(api.UsageError, match='holds no run'):
        api.evaluate(tmp_path)


def test_a_run_stopped_before_it_learned_is_a_failed_one(tmp_path):
    def stop(line):
        if line.startswith('run directory'):
            # Beside it there may be Python's own tracker of the resources of other processes.
            children = psutil.Process().children()
            (process,) = [each for each in children if str(tmp_path) in ' '.join(each.cmdline())]
            process.send_signal(signal.SIGTERM)

    with pytest.raises(api.RunFailedError, match='run directory'):
        api.train(api.experiment(), tmp_path / 'run', progress=stop)
    assert not (tmp_path / 'run').exists()


def test_ctrl_c_ends_the_run_before_it_is_raised(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train(api.experiment(), tmp_path / 'run', progress=interrupt)
    assert not (tmp_path / 'run').exists()  # nothing was learned: no trace of it is left


def test_a_run_ends_with_the_process_that_asked_for_it(tmp_path):
    program = (
        'import os, sys; from pipelines import api;'
        'api.train(api.experiment(), sys.argv[1], progress=lambda line: os._exit(7))'
    )
    command = [sys.executable, '-c', program, str(tmp_path / 'run')]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 7
    # Its servers are starting; they end once they answer, after their imports.
    assert eventually(lambda: not (tmp_path / 'run').exists(), timeout_seconds=60)
