"""The evaluation command: which policies it accepts, what it writes, what it says."""

import errno
import json
import os
import pathlib
import shutil
import signal
import tempfile

import pytest

from infra.parameter_server.checkpoint import Checkpoint
from pipelines import evaluate, export
from pipelines.errors import UsageError
from pipelines.evaluation import entrants, local, policies, starts
from pipelines.evaluation.play import Failure, Score
from pipelines.evaluation.starts import Start, StartFile
from pipelines.experiment import builders, presets
from pipelines.experiment import config as config_lib
from pipelines.launch import evaluation
from pipelines.storage import evaluations


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run whose checkpoint holds the parameters of a new network."""
    experiment = presets.experiment('laptop', {})
    path = tmp_path / 'run'
    path.mkdir()
    (path / 'config.json').write_text(config_lib.to_json(experiment))
    policy = builders.build_policy(experiment)
    saved = Checkpoint(
        layout=builders.layout_of(policy),
        parameters=policy.parameters(),
        target=policy.parameters(),
        clock={'updates': 1},
    )
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
        assert len(list(run_dir.glob('*.partial.json'))) == 1
        os.kill(os.getpid(), number)

    monkeypatch.setattr(local, 'play_all', one_game_and_a_signal)
    assert evaluate.main([f'--run_dir={run_dir}']) == 128 + number
    said = f'evaluate.py: {number.name}: stopped. No result is written.\n'
    assert capsys.readouterr().err == said
    assert sorted(file.name for file in run_dir.iterdir()) == ['config.json', 'evaluation.json']
    assert (run_dir / evaluations.EVALUATION_FILE).read_text() == 'the one before'
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize('command', [evaluate, export])
def test_a_signal_that_an_import_turns_into_another_error_is_one_line(
    run_dir, temporary, monkeypatch, capsys, command
):
    def import_tensorflow(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ImportError('initialization failed') from None

    monkeypatch.setattr(command, command.__name__.rpartition('.')[2], import_tensorflow)
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


def test_a_result_says_what_was_played_with_what(run_dir, monkeypatch):
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

    monkeypatch.setattr(evaluations, 'write_json', full)
    output = run_dir / 'new' / 'result.json'
    assert evaluate.main([f'--run_dir={run_dir}', f'--output={output}']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert 'not written: pong: mean return 2.0' in first
    assert f'{output}: cannot be written (No space left on device). Fix: ' in second
    assert not output.exists()


def test_without_a_single_game_nothing_is_written(run_dir, monkeypatch, capsys):
    played(monkeypatch, [Failure(0, 0, 'OSError: gone')])
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=1']) == 2
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


def test_several_policies_have_a_file_each(run_dir, tmp_path, monkeypatch):
    played(monkeypatch, scores(1.0) + scores(5.0, policy=1))
    flags = ['--policy', 'random', '--games', 'pong', '--episodes=1']
    output = tmp_path / 'results'
    assert evaluate.main(['--run_dir', str(run_dir), *flags, f'--output={output}']) == 0
    results = [json.loads(file.read_text()) for file in sorted(output.iterdir())]
    assert [r['policy']['kind'] for r in results] == ['random', 'run']
    assert [r['mean'] for r in results] == [5.0, 1.0]
    assert results[0]['epsilon'] == 1.0


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
    assert 'no checkpoint yet' in capsys.readouterr().err


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


@pytest.fixture
def saved_model(run_dir):
    """The policy of `run_dir`, exported into it."""
    assert export.main([f'--run_dir={run_dir}']) == 0
    return run_dir / 'policy'


def test_a_saved_model_plays_as_the_run_that_it_is_from(saved_model, run_dir, tmp_path):
    # Greedy: otherwise the two would differ only by chance.
    flags = ['--episodes=1', '--seed=3', '--epsilon=0']
    assert evaluate.main([f'--run_dir={run_dir}', *flags]) == 0
    output = tmp_path / 'saved.json'
    assert evaluate.main([f'--policy={saved_model}', *flags, f'--output={output}']) == 0
    result = json.loads(output.read_text())
    assert result['returns'] == result_of(run_dir)['returns']
    assert result['details'] == result_of(run_dir)['details']
    assert result['policy']['kind'] == 'saved_model'


class TestBadInput:
    def refused(self, flags, capsys) -> str:
        before = sorted(pathlib.Path.cwd().iterdir())
        assert evaluate.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'Fix: ' in line
        assert sorted(pathlib.Path.cwd().iterdir()) == before
        return line

    def test_a_policy_of_another_game(self, run_dir, saved_model, tmp_path, capsys):
        capsys.readouterr()
        line = self.refused([f'--run_dir={run_dir}', '--games=breakout'], capsys)
        assert 'a policy for pong, not for breakout' in line
        line = self.refused([f'--policy={saved_model}', '--games=breakout'], capsys)
        assert 'a policy for pong, not for breakout' in line
        alone = shutil.copytree(saved_model, tmp_path / 'alone')  # without its run
        line = self.refused([f'--policy={alone}', '--games=breakout'], capsys)
        assert 'a policy of another game (6 actions; breakout has 4)' in line
        assert 'its game is unknown' in self.refused([f'--policy={alone}'], capsys)

    def test_a_damaged_saved_model(self, saved_model, capsys):
        capsys.readouterr()
        (saved_model / 'saved_model.pb').write_bytes(b'damaged')
        assert 'cannot be loaded' in self.refused([f'--policy={saved_model}'], capsys)

    def test_what_is_no_policy(self, tmp_path, capsys):
        assert 'not a SavedModel' in self.refused([f'--policy={tmp_path}'], capsys)
        assert 'no game is named' in self.refused(['--policy=random'], capsys)
        assert 'nothing to evaluate' in self.refused([], capsys)
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
