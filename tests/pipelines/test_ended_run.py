"""What is asked of a run that has ended: evaluations and policies, there and elsewhere."""

import datetime
import json
import pathlib
import shutil
import sys
import types

import av
import pytest

from infra import disk
from pipelines import evaluate, export, finish, run
from pipelines.errors import UsageError
from pipelines.evaluation import results, video
from pipelines.experiment import command_line, presets
from pipelines.experiment import config as config_lib
from pipelines.storage import evaluations, provenance
from pipelines.storage.resuming import resuming
from pipelines.storage.run_directory import RunDirectory, command
from pipelines.storage.snapshots import keep_checkpoint_if_best
from tests.support import saved_run, sharing

CONFIG = presets.experiment(
    'laptop', {'torso': 'dqn2013_half', 'evaluation_episodes': 2, 'evaluation_max_frames': 200}
)


@pytest.fixture(scope='module')
def run_dir():
    """The directory of a run with a checkpoint and its own evaluation."""
    with sharing.public_directory() as directory, saved_run.active(directory / 'run', CONFIG):
        path = directory / 'run'
        (path / evaluations.EVALUATION_FILE).write_text('the own one')
        yield path


@pytest.fixture
def elsewhere():
    with sharing.public_directory() as path:
        yield path


def test_each_evaluation_has_a_file_of_its_own_and_the_runs_stays(run_dir, capsys, monkeypatch):
    moment = types.SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 1))  # both begin in it
    monkeypatch.setattr(results, 'datetime', types.SimpleNamespace(datetime=moment))
    for _ in range(2):
        assert evaluate.main([f'--run_dir={run_dir}', '--episodes=1']) == 0
    written = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1::2]]
    files = sorted(map(str, run_dir.glob('evaluation-*')))
    assert sorted(written) == files
    assert len(files) == 2
    for path in files:
        assert (disk.read_json(pathlib.Path(path)) or {})['episodes'] == 1
    assert (run_dir / evaluations.EVALUATION_FILE).read_text() == 'the own one'


def launch(*flags):
    return command_line.parse([*flags])[0]


def test_each_resume_is_noted_beside_the_configuration_with_what_it_changes(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / 'run')
    new = config_lib.replace(CONFIG, {'learning_rate': 0.1, 'max_frames': 9_000_000})
    old = tmp_path / 'run' / 'resumptions.jsonl'  # of an earlier version
    old.write_text('{"time": 1.0}\n')
    flags = ('--runner=PrismRunner', '--wandb_project=gorila')
    resume = launch('--resume', f'--run_dir={tmp_path / "run"}', *flags)
    with RunDirectory.open(tmp_path / 'run', resume=True) as directory:
        for _ in range(2):
            run.write_config(new, resume, directory)
        assert config_lib.load(directory.config_file) == new
        rows = provenance.launches(directory.launches_file)
    before, frames = CONFIG.parameter_server.learning_rate, CONFIG.run.max_frames
    changed = {'learning_rate': [before, 0.1], 'max_frames': [frames, 9_000_000]}
    described = provenance.describe(sys.orig_argv)
    logged = {'project': 'gorila', 'id': rows[0]['wandb']['id']}
    for row, expected in zip(rows, (changed, {}), strict=True):
        # 100 agent steps of 4 frames.
        progress = {'resumed': True, 'changed': expected, 'frames': 400, 'updates': 7}
        progress |= {'wall_seconds': 60.0}
        engine = {'engine': 'PrismRunner'}
        assert row.pop('wandb') == logged
        assert row == {**described, 'time': row['time'], **engine, **progress}
    assert old.read_text() == '{"time": 1.0}\n'


DONE = config_lib.replace(CONFIG, {'max_frames': 400, 'min_replay_size': 1})


def complete(path):
    """Writes what the end of a run at its budget of 100 agent steps leaves."""
    (path / 'policy').mkdir()
    result = {'protocol': 'noop', 'episodes': 2, 'epsilon': 0.05, 'mean': 3.0, 'std': 0.0}
    (path / 'evaluation.json').write_text(json.dumps(result))
    (path / 'summary.json').write_text(json.dumps({'frames': 400, 'evaluation': result}))


@pytest.mark.parametrize(
    ('missing', 'left'),
    [
        ('summary.json', None),
        ('summary.json', {'frames': 400, 'evaluation': None}),
        ('summary.json', {'frames': 396, 'evaluation': {}}),  # of an earlier, smaller budget
        ('summary.json', {'frames': 400, 'evaluation': {}, 'exported': False}),  # policy of before
        ('evaluation.json', None),
        ('policy', None),
    ],
)
def test_a_run_at_its_budget_resumes_while_its_end_is_incomplete(run_dir, tmp_path, missing, left):
    path = tmp_path / 'run'
    shutil.copytree(run_dir, path)
    complete(path)
    (path / missing).rmdir() if missing == 'policy' else (path / missing).unlink()
    if left is not None:
        (path / missing).write_text(json.dumps(left))
    with RunDirectory.open(path, resume=True) as directory:
        run.write_config(DONE, launch('--resume', f'--run_dir={path}'), directory)
        assert resuming(directory) == f'resume with {command("run", path, "--resume")}'


def test_a_resumption_with_nothing_left_to_do_names_what_can_be_done_instead(run_dir, tmp_path):
    path = tmp_path / 'a run'
    shutil.copytree(run_dir, path)
    complete(path)
    with RunDirectory.open(path, resume=True) as directory:
        with pytest.raises(UsageError) as refused:
            run.write_config(DONE, launch('--resume', f'--run_dir={path}'), directory)
    text = str(refused.value)
    assert '400 of --max_frames 400' in text
    assert 'raise --max_frames' in text
    assert 'pipelines/evaluate.py' in text
    assert f"--run_dir '{path}'`" in text


def assert_needs_an_output(main, run_dir, capsys):
    assert main([f'--run_dir={run_dir}']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'Permission denied' in line
    assert '--output' in line


def test_a_run_that_may_only_be_read_is_evaluated_elsewhere(run_dir, elsewhere, capsys):
    output = elsewhere / 'new' / 'result.json'
    with sharing.as_reader(run_dir):
        assert_needs_an_output(evaluate.main, run_dir, capsys)
        assert RunDirectory.existing(run_dir).holder() is not None  # as `stop.py` asks
        assert evaluate.main([f'--run_dir={run_dir}', f'--output={output}']) == 0
    assert json.loads(output.read_text())['episodes'] == 2
    assert list(output.parent.iterdir()) == [output]


def test_a_run_that_may_only_be_read_is_exported_elsewhere(
    run_dir, elsewhere, capsys, caplog, recwarn
):
    output = elsewhere / 'new' / 'policy'
    with sharing.as_reader(run_dir):
        assert_needs_an_output(export.main, run_dir, capsys)
        assert export.main([f'--run_dir={run_dir}', f'--output={output}']) == 0
        assert export.main([f'--run_dir={run_dir}', f'--output={output}']) == 0  # replaced
    assert (output / 'saved_model.pb').is_file()
    assert list(output.parent.iterdir()) == [output]
    assert (caplog.messages, recwarn.list) == ([], [])  # what TensorFlow says of every policy


def test_a_directory_with_another_programs_policy_is_left_alone(run_dir, elsewhere, capsys):
    (elsewhere / 'policy.json').write_text('{"Statement": []}')
    assert export.main([f'--run_dir={run_dir}', f'--output={elsewhere}']) == 2
    assert 'not a policy' in capsys.readouterr().err
    assert [file.name for file in elsewhere.iterdir()] == ['policy.json']


@pytest.mark.parametrize('name', ['run', 'run/config.json'])
def test_an_output_that_holds_something_else_is_refused_and_left_alone(run_dir, capsys, name):
    before = sorted(run_dir.rglob('*'))
    output = run_dir.parent / name
    for main in (evaluate.main, export.main):
        assert main([f'--run_dir={run_dir}', f'--output={output}']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f'--output {output}: ' in line
        assert 'not a policy' in line or 'already exists' in line or 'a directory' in line
    assert sorted(run_dir.rglob('*')) == before
    assert config_lib.load(run_dir / 'config.json') == CONFIG


def test_a_policy_that_cannot_be_exported_is_evaluated_all_the_same(monkeypatch, capsys):
    def fail(_):
        raise TypeError("the agent's own")

    evaluated: list[list[str]] = []
    monkeypatch.setattr(finish.export, 'main', fail)

    def evaluate_nothing(argv):
        evaluated.append(argv)
        return 0

    monkeypatch.setattr(finish.evaluate, 'main', evaluate_nothing)
    monkeypatch.setattr(finish, 'await_release', lambda: False)
    assert finish.main(['runs/a', 'runs/a/evaluation.json', '120']) == 0
    assert not evaluated  # its launcher has ended
    monkeypatch.setattr(finish, 'await_release', lambda: True)
    assert finish.main(['runs/a', 'runs/a/evaluation.json', '120']) == 1
    output, hang = '--output=runs/a/evaluation.json', '--hang_seconds=120'
    assert evaluated == [['--run_dir=runs/a', output, hang]]
    assert "TypeError: the agent's own" in capsys.readouterr().err


class TestTheLastEvaluationOfARun:
    """It has 30 games by default, those during training have five."""

    @pytest.fixture
    def ended(self, run_dir, tmp_path, monkeypatch):
        """A copy of the run with a best policy of training, which ends."""
        monkeypatch.setattr(finish, 'await_release', lambda: True)
        path = pathlib.Path(shutil.copytree(run_dir, tmp_path / 'run'))
        (path / 'config.json').write_text(
            config_lib.to_json(config_lib.replace(CONFIG, {'video': False}))
        )

        def end(**best):
            shutil.copytree(
                path / 'checkpoints/checkpoint-00000001/parameters', path / 'best/parameters'
            )
            numbers = {'time': 1.0, 'frames': 40, 'updates': 3, 'episodes': 5, 'std': 0.0}
            rules = {'protocol': 'noop', 'epsilon': 0.05, 'max_frames': 200}
            row = {**numbers, **rules, **best}
            (path / 'best/evaluation.json').write_text(json.dumps(row))
            code = finish.main([str(path), str(path / 'evaluation.json'), '60'])
            assert (path / 'policy_best/saved_model.pb').is_file()
            return code, disk.read_json(path / 'best/evaluation.json') or {}

        return end

    def test_makes_the_trained_policy_the_best_one_if_it_is(self, ended):
        code, best = ended(mean=-21.0)  # 50 agent steps lose fewer points
        assert code == 0
        # The shards of the saved run have applied no gradient.
        assert (best['updates'], best['frames'], best['episodes']) == (0, 0, 2)
        assert best['mean'] > -21.0
        assert len(best['returns']) == 2

    def test_replaces_one_whose_score_is_damaged(self, ended):
        assert ended(mean=None)[1]['episodes'] == 2

    def test_replaces_one_of_the_same_parameters(self, ended):
        assert ended(mean=21.0, updates=0)[1]['episodes'] == 2

    def test_leaves_a_better_one(self, ended):
        assert ended(mean=21.0)[1]['updates'] == 3

    def test_replaces_one_by_other_rules(self, ended):
        assert ended(mean=21.0, max_frames=4_000)[1]['updates'] == 0

    def test_with_games_that_failed_replaces_none(self, ended, tmp_path):
        assert ended(mean=21.0)[1]['updates'] == 3
        path = tmp_path / 'run'
        result = disk.read_json(path / 'evaluation.json') or {}
        for failed, updates in ((1, 3), (0, 0)):
            best = {**result, 'mean': 21.0, 'failed': failed}
            keep_checkpoint_if_best(RunDirectory.existing(str(path)), best)
            kept = disk.read_json(path / 'best/evaluation.json') or {}
            assert kept['updates'] == updates


class TestTheVideoOfARun:
    @pytest.fixture
    def filmed(self, run_dir, tmp_path):
        """A copy of the run, to film."""
        return pathlib.Path(shutil.copytree(run_dir, tmp_path / 'run'))

    def test_shows_the_newest_policy_and_replaces_the_one_before(self, filmed):
        (filmed / 'video.mp4').write_text('the one before')
        assert finish.film([str(filmed), '60']) == 0
        with av.open(str(filmed / 'video.mp4')) as video:
            assert sum(1 for _ in video.decode(video=0)) == 200 / 4 + 1

    def test_shows_the_best_policy_if_there_is_one(self, filmed, monkeypatch):
        (newest,) = (filmed / 'checkpoints').iterdir()
        shutil.copytree(newest / 'parameters', filmed / 'best' / 'parameters')
        shown: list[str | None] = []
        monkeypatch.setattr(video, 'record', lambda policy, *_: shown.append(policy.checkpoint))
        assert finish.film([str(filmed), '60']) == 0
        assert shown == ['best']

    def test_names_itself_where_a_checkpoint_is_damaged(self, filmed, capsys):
        (newest,) = (filmed / 'checkpoints').iterdir()
        damaged = shutil.copytree(newest, newest.with_name('checkpoint-00000002'))
        next((damaged / 'parameters').glob('*.index')).unlink()
        assert finish.film([str(filmed), '60']) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('video.mp4: ')
        assert line.endswith('; skipped')

    def test_is_not_made_without_the_setting(self, filmed):
        silent = config_lib.replace(CONFIG, {'video': False})
        (filmed / 'config.json').write_text(config_lib.to_json(silent))
        assert finish.film([str(filmed), '60']) == 0
        assert not (filmed / 'video.mp4').exists()

    def test_that_takes_too_long_is_one_line(self, filmed, monkeypatch, capsys):
        monkeypatch.setattr(video, 'RUN_SECONDS', -1.0)
        assert finish.film([str(filmed), '60']) == 1
        assert capsys.readouterr().err == 'video.mp4: not made within -1 s\n'
        assert not (filmed / 'video.mp4').exists()
