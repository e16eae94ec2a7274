"""The evaluation command: which policies it accepts, what it writes, what it says."""

import dataclasses
import errno
import importlib
import json
import os
import pathlib
import shutil
import signal
import tempfile
import time
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.policies import policy_saver, py_tf_eager_policy, random_tf_policy
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

from agents.config import EnvironmentConfig
from infra import sealed
from infra.parameter_server.checkpoint import Checkpoint
from pipelines import api, evaluate, export
from pipelines.errors import UsageError
from pipelines.evaluation import entrants, local, policies, results, starts
from pipelines.evaluation.play import Failure, Score
from pipelines.evaluation.starts import Start, StartFile
from pipelines.experiment import builders, presets
from pipelines.experiment import config as config_lib
from pipelines.launch import evaluation
from pipelines.storage import evaluations, outputs, saved_policies
from tests.support import dqn_agents

DATA = 'variables/variables.data-00000-of-00001'
HALF = b'half of the file'
EXPERIMENT = presets.experiment('laptop', {})


@pytest.fixture(scope='module')
def saved():
    """The parameters of a new network."""
    return checkpoint_of(builders.build_policy(EXPERIMENT))


def checkpoint_of(policy):
    return Checkpoint(
        layout=builders.layout_of(policy),
        parameters=np.zeros_like(policy.parameters()),  # that no policy may play with
        average=policy.parameters(),
        target=policy.parameters(),
        clock={'updates': 1},
    )


@pytest.fixture
def run_dir(tmp_path, monkeypatch, saved):
    """A run whose checkpoint holds these."""
    path = tmp_path / 'run'
    path.mkdir()
    (path / 'config.json').write_text(config_lib.to_json(EXPERIMENT))
    for command in (policies, export):
        monkeypatch.setattr(command, 'read_parameters', lambda *_: ('checkpoint-00000001', saved))
    return path


def scores(*values, policy=0):
    """Records of games as they end."""
    return [Score(policy, i, 1, None, value, 100, False) for i, value in enumerate(values)]


def played(monkeypatch, records):
    monkeypatch.setattr(local, 'play_all', lambda *_: iter(records))


def result_of(run_dir) -> dict:
    (file,) = run_dir.glob('evaluation-*.json')
    return json.loads(file.read_text())


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The directory of temporary files, empty."""
    path = tmp_path / 'temporary'
    path.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(path))
    return path


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_games_leaves_the_evaluation_before(
    run_dir, temporary, monkeypatch, capsys, number
):
    (run_dir / evaluations.EVALUATION_FILE).write_text('the one before')

    def one_game_and_a_signal(*_):
        yield scores(1.0)[0]
        os.kill(os.getpid(), number)

    monkeypatch.setattr(local, 'play_all', one_game_and_a_signal)
    assert evaluate.main([f'--run_dir={run_dir}']) == 128 + number
    said = f'evaluate.py: {number.name}: stopped. No result is written.\n'
    assert capsys.readouterr().err == said
    assert sorted(file.name for file in run_dir.iterdir()) == ['config.json', 'evaluation.json']
    assert (run_dir / evaluations.EVALUATION_FILE).read_text() == 'the one before'
    assert list(temporary.iterdir()) == []


def test_a_signal_during_an_import_waits_for_its_end(run_dir, monkeypatch, capsys):
    (run_dir / 'imported.py').write_text(
        'import os, signal\n'
        'try:\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        'except BaseException:\n'
        '    raise ImportError\n'
        'complete = True\n'
    )
    monkeypatch.syspath_prepend(run_dir)

    def imports_and_plays(*_):
        assert importlib.import_module('imported').complete
        time.sleep(60.0)
        yield from ()

    monkeypatch.setattr(local, 'play_all', imports_and_plays)
    assert evaluate.main([f'--run_dir={run_dir}']) == 143
    said = 'evaluate.py: SIGTERM: stopped. No result is written.\n'
    assert capsys.readouterr().err == said


@pytest.mark.parametrize('command', [evaluate, export])
def test_a_signal_that_a_library_turns_into_another_error_is_one_line(
    run_dir, temporary, monkeypatch, capsys, command
):
    def fail(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise SystemError('initialization failed') from None

    monkeypatch.setattr(command, command.__name__.rpartition('.')[2], fail)
    assert command.main([f'--run_dir={run_dir}']) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{command.__name__.rpartition(".")[2]}.py: SIGTERM: stopped. No ')
    assert list(temporary.iterdir()) == []


def test_a_long_evaluation_shows_its_progress_every_ten_seconds(run_dir, monkeypatch, capsys):
    now = 1_000.0

    def one_game_in_six_seconds(*_):
        nonlocal now
        for record in scores(1.0, 2.0, 3.0, 4.0):
            now += 6.0
            yield record

    monkeypatch.setattr(local, 'play_all', one_game_in_six_seconds)
    monkeypatch.setattr(evaluation, 'monotonic', lambda: now)
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=4']) == 0
    assert capsys.readouterr().err == (
        'evaluate.py: 2 of 4 episodes, mean return 1.5\n'
        'evaluate.py: 4 of 4 episodes, mean return 2.5\n'
    )


def test_a_result_says_what_was_played_with_what(run_dir, monkeypatch, capsys):
    played(monkeypatch, scores(1.0, 3.0))
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=2', '--epsilon=0.1']) == 0
    result = result_of(run_dir)
    assert result['protocol'] == 'noop'
    assert result['deviations'] == {'epsilon': 0.1, 'episodes': 2}  # noop has 0.05 and 30
    assert (result['mean'], result['std'], result['standard_error']) == (2.0, 1.0, 1.0)
    assert (result['game'], result['updates'], result['seed']) == ('pong', 1, 1)
    assert result['policy'] == {
        'kind': 'run',
        'path': str(run_dir),
        'checkpoint': 'checkpoint-00000001',
        'updates': 1,
    }
    assert '--epsilon=0.1' in result['provenance']['command']
    assert result['provenance']['packages']['tensorflow'] == '2.15.1'
    line, place = capsys.readouterr().out.splitlines()
    assert line == (
        'pong: mean return 2.0, standard error 1.0, over 2 games (protocol noop, epsilon 0.1, at'
        ' most 18,000 frames; deviations: epsilon 0.1, episodes 2)'
    )
    assert place.startswith(f'policy {run_dir}; written to {run_dir}/evaluation-noop-')


@pytest.mark.parametrize('command', ['evaluate.py', 'api'])
def test_the_games_have_the_bound_of_the_command(run_dir, monkeypatch, command):
    seen = []

    def play_all(policies, games, num_threads, hang_seconds, tick):
        seen.append(hang_seconds)
        yield from scores(1.0)

    monkeypatch.setattr(local, 'play_all', play_all)
    if command == 'api':
        api.evaluate(run_dir, hang_seconds=33.0)
    else:
        evaluate.main([f'--run_dir={run_dir}', '--hang_seconds=33'])
    assert seen == [33.0]


def test_a_video_has_the_bound_of_the_command(tmp_path):
    path = tmp_path / 'a.mp4'
    flags = ['--policy=random', '--games=pong', f'--video={path}', '--hang_seconds=33']
    film = evaluate._film(evaluate.parse(flags))
    assert film is not None
    assert (film.hang_seconds, film.new) == (33.0, True)


def test_a_failed_game_is_counted_and_named_and_the_rest_stands(run_dir, monkeypatch, capsys):
    played(monkeypatch, [*scores(1.0, 3.0), Failure(0, 2, 'OSError: gone')])
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=3']) == 1
    result = result_of(run_dir)
    assert (result['episodes'], result['failed'], result['mean']) == (2, 1, 2.0)
    assert result['failures'] == [{'episode': 2, 'reason': 'OSError: gone'}]
    assert 'game 2 failed (OSError: gone)' in capsys.readouterr().err


def test_a_policy_without_a_game_leaves_the_results_of_the_others(
    run_dir, tmp_path, monkeypatch, capsys
):
    played(monkeypatch, [Failure(0, 0, 'OSError: gone'), *scores(5.0, policy=1)])
    flags = ['--policy', 'random', '--games', 'pong', '--episodes=1']
    output = tmp_path / 'results'
    assert evaluate.main(['--run_dir', str(run_dir), *flags, f'--output={output}']) == 1
    (file,) = output.iterdir()
    assert json.loads(file.read_text())['policy']['kind'] == 'random'
    assert 'no game could be played; no result is written' in capsys.readouterr().err


def test_a_score_that_cannot_be_written_is_printed(run_dir, monkeypatch, capsys):
    played(monkeypatch, scores(1.0, 3.0))

    def full(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(outputs, 'write_atomically', full)
    output = run_dir / 'new' / 'result.json'
    assert evaluate.main([f'--run_dir={run_dir}', f'--output={output}']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert 'not written: pong: mean return 2.0' in first
    assert f'{output}: cannot be written (No space left on device). Fix: ' in second
    assert not output.exists()


def test_a_score_that_cannot_be_written_costs_no_other(run_dir, tmp_path, monkeypatch, capsys):
    played(monkeypatch, [*scores(1.0), *scores(5.0, policy=1)])
    write = outputs.write_atomically

    def full(path, content):
        if 'random' not in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        write(path, content)

    monkeypatch.setattr(outputs, 'write_atomically', full)
    flags = ['--policy', 'random', '--games', 'pong', '--episodes=1']
    output = tmp_path / 'results'
    assert evaluate.main(['--run_dir', str(run_dir), *flags, f'--output={output}']) == 2
    (file,) = output.iterdir()
    assert json.loads(file.read_text())['mean'] == 5.0
    assert 'not written: pong: mean return 1.0' in capsys.readouterr().err


def test_an_output_without_a_name_is_one_line(run_dir, capsys):
    assert evaluate.main([f'--run_dir={run_dir}', '--output=/']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert '--output /: ' in line


def test_without_a_single_game_nothing_is_written(run_dir, monkeypatch, capsys):
    played(monkeypatch, [Failure(0, 0, 'OSError: gone')])
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=1']) == 1
    error = capsys.readouterr().err
    assert 'game 0 failed (OSError: gone)' in error
    assert 'no game could be played. Fix: ' in error
    assert [file.name for file in run_dir.iterdir()] == ['config.json']


def test_an_existing_file_is_not_overwritten(run_dir, tmp_path, capsys):
    output = tmp_path / 'result.json'
    output.write_text('{"returns": []}')
    assert evaluate.main([f'--run_dir={run_dir}', f'--output={output}']) == 2
    assert f'--output {output}: already exists' in capsys.readouterr().err
    assert output.read_text() == '{"returns": []}'


def test_the_evaluation_at_the_end_of_a_run_keeps_the_one_before(tmp_path):
    file = tmp_path / evaluations.EVALUATION_FILE
    before = {'protocol': 'noop', 'episodes': 1, 'epsilon': 0.05, 'mean': 1.0, 'std': 0.0}
    evaluations.write(str(file), {**before, 'updates': 7})
    evaluations.require_new(str(file))
    evaluations.write(str(file), {**before, 'updates': 9})
    kept = evaluations.read_result(tmp_path / 'evaluation-7-updates.json')
    assert (kept or {})['updates'] == 7
    assert (evaluations.read_result(file) or {})['updates'] == 9


def test_a_damaged_evaluation_at_the_end_of_a_run_is_set_aside(tmp_path):
    file = tmp_path / evaluations.EVALUATION_FILE
    file.write_bytes(b'\x00damaged')
    evaluations.require_new(str(file))
    after = {'protocol': 'noop', 'episodes': 1, 'epsilon': 0.05, 'mean': 1.0, 'std': 0.0}
    evaluations.write(str(file), after)
    assert (tmp_path / 'damaged-evaluation.json').read_bytes() == b'\x00damaged'
    assert (evaluations.read_result(file) or {})['mean'] == 1.0


def test_of_two_evaluations_with_one_output_the_second_is_refused(tmp_path):
    output = str(tmp_path / 'result.json')
    for _ in range(2):
        evaluations.require_new(output)  # both begin before either ends
    evaluations.write(output, {'mean': 1.0})
    with pytest.raises(UsageError, match='already exists'):
        evaluations.write(output, {'mean': 2.0})
    assert json.loads(pathlib.Path(output).read_text()) == {'mean': 1.0}


def test_a_directory_as_output_gets_a_file_of_the_usual_name(run_dir, tmp_path, monkeypatch):
    played(monkeypatch, scores(1.0) * 2)
    (tmp_path / 'there').mkdir()
    for output in ('there/', 'new/'):
        flags = [f'--run_dir={run_dir}', '--episodes=1', f'--output={tmp_path}/{output}']
        assert evaluate.main(flags) == 0
        (file,) = (tmp_path / output).iterdir()
        assert file.name.startswith('run-pong-noop-')


def test_a_file_beside_the_output_is_left_alone(run_dir, tmp_path, monkeypatch):
    played(monkeypatch, scores(1.0))
    beside = tmp_path / 'a.partial.json'
    beside.write_text('mine')
    flags = [f'--run_dir={run_dir}', '--episodes=1', f'--output={tmp_path}/a.json']
    assert evaluate.main(flags) == 0
    assert beside.read_text() == 'mine'


def test_progress_that_cannot_be_written_costs_no_score(run_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    played(monkeypatch, scores(1.0))
    monkeypatch.setattr(evaluation, 'write_json', full)
    output = tmp_path / 'evaluation.json'  # as the launcher names it, which reads the progress
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=1', f'--output={output}']) == 0
    assert json.loads(output.read_text())['episodes'] == 1


def test_several_policies_have_a_file_each_and_random_plays_the_game_of_the_run(
    run_dir, tmp_path, monkeypatch
):
    played(monkeypatch, scores(1.0) + scores(5.0, policy=1))
    flags = ['--policy', 'random', '--episodes=1']
    output = tmp_path / 'results'
    assert evaluate.main(['--run_dir', str(run_dir), *flags, f'--output={output}']) == 0
    written = [json.loads(file.read_text()) for file in sorted(output.iterdir())]
    assert [r['policy']['kind'] for r in written] == ['random', 'run']
    assert [r['mean'] for r in written] == [5.0, 1.0]
    assert written[0]['epsilon'] == 1.0
    assert [file.name.partition('-noop')[0] for file in sorted(output.iterdir())] == [
        'random-pong',
        'run-pong',
    ]


@pytest.mark.parametrize(
    ('kind', 'path', 'name'),
    [
        ('run', 'runs/a', 'a-pong-noop-'),
        ('run', 'gs://bucket/runs/a/', 'a-pong-noop-'),
        ('saved_model', 'runs/a/policy', 'a-policy-pong-noop-'),
        ('saved_model', 'runs/a/policy_best', 'a-policy_best-pong-noop-'),
        ('saved_model', 'policy', 'policy-pong-noop-'),
    ],
)
def test_a_file_outside_the_run_names_its_policy(kind, path, name):
    result = {'policy': {'kind': kind, 'path': path}, 'game': 'pong', 'protocol': 'noop'}
    assert results.file_name(result, elsewhere=True).startswith(name)


def test_a_slash_in_an_environments_name_makes_no_folder():
    policy = {'kind': 'random', 'path': 'random'}
    result = {'policy': policy, 'game': 'MinAtar/Breakout-v1', 'protocol': 'plain'}
    name = results.file_name(result, elsewhere=True)
    assert name.startswith('random-MinAtar_Breakout-v1-plain-')


@pytest.mark.parametrize('command', [evaluate, export])
def test_temporary_files_of_tensorflow_are_removed(run_dir, temporary, monkeypatch, command):
    def leave_a_file(*_):
        tempfile.mkstemp(prefix='__autograph_generated_file')
        raise OSError('full')

    monkeypatch.setattr(command, command.__name__.rpartition('.')[2], leave_a_file)
    assert command.main([f'--run_dir={run_dir}']) == 2
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'{}'])
def test_an_unreadable_configuration_is_one_line(tmp_path, capsys, content):
    (tmp_path / 'config.json').write_bytes(content)
    assert evaluate.main([f'--run_dir={tmp_path}']) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_run_without_a_checkpoints_directory_is_one_line(tmp_path, capsys):
    (tmp_path / 'config.json').write_text(config_lib.to_json(presets.experiment('laptop', {})))
    assert evaluate.main([f'--run_dir={tmp_path}']) == 2
    assert 'no checkpoint yet. Fix: train for longer' in capsys.readouterr().err
    (tmp_path / 'best').mkdir()
    assert evaluate.main([f'--run_dir={tmp_path}']) == 2
    assert 'no checkpoint yet. Fix: add --checkpoint best, or train' in capsys.readouterr().err


@pytest.mark.parametrize('which', ['best', '7'])
def test_a_checkpoint_that_does_not_exist_is_one_line(tmp_path, capsys, which):
    (tmp_path / 'config.json').write_text(config_lib.to_json(presets.experiment('laptop', {})))
    assert evaluate.main([f'--run_dir={tmp_path}', f'--checkpoint={which}']) == 2
    assert f'no checkpoint {which} (there are: none)' in capsys.readouterr().err


@pytest.mark.parametrize('command', [evaluate, export])
def test_a_game_that_would_end_the_interpreter_is_one_line(run_dir, capsys, command):
    experiment = presets.experiment('laptop', {'game': 'joust'})
    (run_dir / 'config.json').write_text(config_lib.to_json(experiment))
    assert command.main([f'--run_dir={run_dir}']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "game 'joust' cannot be played" in line


@pytest.fixture(scope='module')
def exported(tmp_path_factory, saved):
    path = tmp_path_factory.mktemp('exported') / 'policy'
    export.export(EXPERIMENT, saved, path)
    return path


@pytest.fixture
def saved_model(run_dir, exported):
    """The policy of `run_dir`, exported into it."""
    return pathlib.Path(shutil.copytree(exported, run_dir / 'policy'))


def test_a_saved_model_plays_anywhere_as_the_run_that_it_is_from(run_dir, exported, tmp_path):
    # Greedy: otherwise the two would differ only by chance.
    flags = ['--episodes=1', '--seed=3', '--epsilon=0']
    assert evaluate.main([f'--run_dir={run_dir}', *flags]) == 0
    output = tmp_path / 'saved.json'
    assert evaluate.main([f'--policy={exported}', *flags, f'--output={output}']) == 0
    result = json.loads(output.read_text())
    assert result['returns'] == result_of(run_dir)['returns']
    assert result['details'] == result_of(run_dir)['details']
    assert result['policy']['kind'] == 'saved_model'


def test_a_saved_model_of_implicit_quantiles_acts_as_its_policy(tmp_path):
    experiment = presets.experiment('laptop', {'agent': 'iqn', 'dueling': True, 'screen_size': 84})
    policy = builders.build_policy(experiment)
    export.export(experiment, checkpoint_of(policy), tmp_path / 'policy')
    loaded = py_tf_eager_policy.SavedModelPyTFEagerPolicy(
        str(tmp_path / 'policy'), load_specs_from_pbtxt=True
    )
    frames = dqn_agents.frames(1, 8)
    action = [int(loaded.action(ts.restart(frame)).action) for frame in frames]
    np.testing.assert_array_equal(action, policy.act(frames))


def test_a_saved_model_keeps_the_environment_that_its_policy_was_trained_in(exported, tmp_path):
    copy = pathlib.Path(shutil.copytree(exported, tmp_path / 'copy'))
    assert saved_policies.checked(str(copy)) == EXPERIMENT.environment
    (copy / 'policy.json').unlink()
    environment = EnvironmentConfig(game='boxing', action_repeat=5, full_action_space=True)
    saved_policies.describe(copy, environment)
    (copy / 'README').write_text('Files may be added.')
    assert saved_policies.checked(str(copy)) == environment


def test_a_saved_model_of_an_earlier_version_plays_the_game_of_the_run_around_it(saved_model):
    (saved_model / 'policy.json').unlink()
    (entrant,) = entrants.entrants(entrants.Request(policies=[str(saved_model)]), print)
    assert entrant.policy.environment == EXPERIMENT.environment


def test_a_saved_model_of_an_earlier_version_has_what_later_settings_replaced(exported, tmp_path):
    copy = pathlib.Path(shutil.copytree(exported, tmp_path / 'copy'))
    values = sealed.unseal(json.loads((copy / 'policy.json').read_text()))
    for added in ('screen_size', 'env_processes', 'full_action_space'):
        del values['environment'][added]
    (copy / 'policy.json').write_text(json.dumps(sealed.seal(values)))
    expected = dataclasses.replace(EXPERIMENT.environment, screen_size=84)
    assert saved_policies.checked(str(copy)) == expected


def damage(file: pathlib.Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is HALF else content)


def saved_policy(directory: pathlib.Path, shape: tuple[int, ...]) -> pathlib.Path:
    """A SavedModel of a policy for another environment than Atari."""
    time_steps = ts.time_step_spec(tf.TensorSpec(shape, tf.float32))
    actions = tensor_spec.BoundedTensorSpec((), tf.int64, 0, 1)
    policy = random_tf_policy.RandomTFPolicy(time_steps, actions)
    policy_saver.PolicySaver(policy).save(str(directory / 'other'))
    return directory / 'other'


class TestBadInput:
    def refused(self, flags, capsys) -> str:
        before = sorted(pathlib.Path.cwd().iterdir())
        assert evaluate.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'Fix: ' in line
        assert sorted(pathlib.Path.cwd().iterdir()) == before
        return line

    def test_a_policy_of_another_game(self, run_dir, saved_model, tmp_path, capsys):
        line = self.refused([f'--run_dir={run_dir}', '--games=breakout'], capsys)
        assert 'a policy for pong, not for breakout' in line
        line = self.refused([f'--policy={saved_model}', '--games=breakout'], capsys)
        assert 'a policy for pong, not for breakout' in line
        alone = pathlib.Path(shutil.copytree(saved_model, tmp_path / 'alone'))  # without its run
        line = self.refused([f'--policy={alone}', '--games=breakout'], capsys)
        assert 'a policy for pong, not for breakout' in line
        (alone / 'policy.json').unlink()  # of an earlier version
        line = self.refused([f'--policy={alone}', '--games=breakout'], capsys)
        assert 'a policy of another game (6 actions; breakout has 4)' in line
        assert 'its game is unknown' in self.refused([f'--policy={alone}'], capsys)

    @pytest.mark.parametrize(
        ('name', 'content', 'problem'),
        [
            ('saved_model.pb', None, 'it is missing'),
            ('saved_model.pb', b'damaged', 'its content has changed'),
            ('policy_specs.pbtxt', None, 'it is missing'),
            ('fingerprint.pb', b'', 'its content has changed'),
            ('variables/variables.index', b'', 'its content has changed'),
            (DATA, None, 'it is missing'),
            (DATA, HALF, 'its content has changed'),
            ('policy.json', HALF, 'no JSON of ours'),
        ],
    )
    def test_a_damaged_saved_model(self, saved_model, capfd, name, content, problem):
        damage(saved_model / name, content)
        line = self.refused([f'--policy={saved_model}'], capfd)
        assert f'--policy {saved_model}: damaged ({name}: {problem}' in line

    @pytest.mark.parametrize(
        'values',
        [
            {'environment': {'game': 'pong'}, 'files': {}},
            {'environment': {**dataclasses.asdict(EXPERIMENT.environment), 'x': 1}, 'files': {}},
            {'environment': ['pong'], 'files': {}},
            {'files': {}},
            {'files': [['saved_model.pb', 1]]},
            {},
        ],
    )
    def test_a_saved_model_of_a_later_version(self, saved_model, capfd, values):
        (saved_model / 'policy.json').write_text(json.dumps(sealed.seal(values)))
        line = self.refused([f'--policy={saved_model}'], capfd)
        assert f'--policy {saved_model}: policy.json is of another version (' in line

    @pytest.mark.parametrize(
        ('name', 'content', 'problem'),
        [
            ('saved_model.pb', None, 'not a SavedModel (saved_model.pb is missing)'),
            ('saved_model.pb', b'', 'damaged (saved_model.pb: it is empty)'),
            ('policy_specs.pbtxt', None, 'damaged (policy_specs.pbtxt: it is missing)'),
            ('variables/variables.index', b'', 'damaged (variables/variables.index: it is empty)'),
            (DATA, None, 'damaged (variables/variables.data-*: it is missing)'),
            ('saved_model.pb', HALF, 'cannot be loaded as a policy of TF-Agents'),
            ('policy_specs.pbtxt', b'damaged', 'cannot be loaded as a policy of TF-Agents'),
            ('variables/variables.index', HALF, 'cannot be loaded as a policy of TF-Agents'),
            (DATA, HALF, 'cannot be loaded as a policy of TF-Agents'),
        ],
    )
    def test_a_damaged_saved_model_without_checksums(
        self, saved_model, capfd, name, content, problem
    ):
        (saved_model / 'policy.json').unlink()  # as of an earlier version
        damage(saved_model / name, content)
        line = self.refused([f'--policy={saved_model}'], capfd)
        assert f'--policy {saved_model}: {problem}' in line

    def test_a_saved_model_without_space_to_unpack_it(self, saved_model, monkeypatch, capsys):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.utime(saved_model / 'saved_model.pb', (0, 0))  # of a container's image
        monkeypatch.setattr(zipfile.ZipFile, 'extractall', full)
        line = self.refused([f'--policy={saved_model}'], capsys)
        assert 'cannot be written (No space left on device). Fix: free some disk space' in line

    def test_a_saved_model_of_something_else(self, tmp_path, capfd):
        line = self.refused([f'--policy={saved_policy(tmp_path, (4,))}', '--games=pong'], capfd)
        assert 'not a policy for Atari (takes float32 [4], returns int64 [])' in line

    def test_what_is_no_policy(self, tmp_path, capsys):
        assert 'not a SavedModel' in self.refused([f'--policy={tmp_path}'], capsys)
        assert 'not on this machine' in self.refused(['--policy=gs://bucket/policy'], capsys)
        assert 'no game is named' in self.refused(['--policy=random'], capsys)
        assert 'nothing to evaluate' in self.refused([], capsys)
        assert self.refused(['--policy=random', '--run_dir=nowhere'], capsys).startswith(
            f'evaluate.py: {pathlib.Path.cwd() / "nowhere"}: no such run directory'
        )
        line = self.refused(['--policy=random', '--games=pong,,breakout'], capsys)
        assert '--games pong,,breakout: a name is empty' in line
        assert evaluate.main(['--policy=random', '--games=pogn']) == 2
        assert 'did you mean pong' in capsys.readouterr().err

    def test_a_protocol_that_does_not_fit(self, run_dir, capsys):
        line = self.refused([f'--run_dir={run_dir}', '--protocol=machado'], capsys)
        assert 'fewer than all 18 actions' in line
        line = self.refused([f'--run_dir={run_dir}', '--protocol=human'], capsys)
        assert 'needs --starts' in line
        line = self.refused([f'--run_dir={run_dir}', '--starts=a.json'], capsys)
        assert 'no effect with --protocol noop' in line

    def test_start_points_with_actions_that_the_policy_lacks(self, run_dir, tmp_path, capsys):
        file = tmp_path / 'starts.json'
        starts.write(file, StartFile('pong', 4, 'person', (Start(b'\x00'), Start(b'\x05'))))
        flags = [f'--run_dir={run_dir}', '--protocol=human', f'--starts={file}']
        assert 'point 1: a start point uses an action outside' in self.refused(flags, capsys)

    @pytest.mark.parametrize(
        ('flags', 'problem'),
        [
            (
                ['--policy=a', '--checkpoint=newest'],
                '--checkpoint newest: no effect without --run_dir',
            ),
            (['--run_dir=a', '--video_overlay'], '--video_overlay: no effect without --video'),
            (['--run_dir=a', '--video_episode=0'], '--video_episode 0: no effect without --video'),
            (
                ['--policy=random', '--games=pong', '--runner=PrismRunner', '--num_workers=2'],
                '--num_workers 2: no effect without an engine that takes it',
            ),
            (
                ['--policy=random', '--epsilon=0'],
                '--epsilon 0.0: no effect without a trained policy',
            ),
            (['--run_dir=a', '--runner=Foo'], "--runner 'Foo': unknown"),
            (['--run_dir=a', '--runner=DaskRunner'], '--dask_client_address or'),
            (['--run_dir=a', '--runner=DirectRunner', '--epsiode=1'], '--epsiode=1: unknown flag'),
            (
                ['--run_dir=a', '--runner=DirectRunner', '--direct_num_workers=1'],
                '--direct_num_workers: reserved, since the number of workers determines it',
            ),
        ],
    )
    def test_flags_without_effect_are_refused_before_a_policy_is_read(self, capsys, flags, problem):
        assert problem in self.refused(flags, capsys)

    @pytest.mark.parametrize('flag', ['--runner=', '--num_workers=0', '--num_workers=99999'])
    def test_work_that_cannot_be_done(self, flag, capsys):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(['--policy=random', '--games=pong', flag])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert flag.partition('=')[0] in line
        assert 'Fix: ' in line

    def test_a_bound_that_a_slow_start_would_exceed(self, capsys):
        flags = ['--policy=random', '--games=pong', '--hang_seconds=1']
        assert '--hang_seconds 1: must be from 10 to 86400. Fix: ' in self.refused(flags, capsys)
        with pytest.raises(UsageError, match='--hang_seconds 1: must be'):
            api.evaluate('runs/a', hang_seconds=1)

    def test_an_unknown_protocol(self, capsys):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(['--policy=random', '--games=pong', '--protocol=mine'])
        assert ended.value.code == 2
        assert "invalid choice: 'mine'" in capsys.readouterr().err


def test_a_run_of_before_is_evaluated_by_its_own_rules(run_dir):
    # Without a protocol in config.json, as versions before wrote it.
    values = json.loads((run_dir / 'config.json').read_text())
    for seal in ('seal', 'checksum'):
        del values[seal]
    del values['run']['evaluation_protocol'], values['environment']['full_action_space']
    values['run']['evaluation_epsilon'] = 0.02
    (run_dir / 'config.json').write_text(json.dumps(values))
    (entrant,) = entrants.entrants(entrants.Request(run_dirs=[str(run_dir)]), print)
    assert (entrant.protocol.name, entrant.protocol.epsilon) == ('noop', 0.02)
    assert entrant.protocol.episodes == 30
