"""Suites: which runs a command plans, how far each is, what starts next; bad input on one line."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import rich.console

from infra.disk import lock
from infra.sealed import seal
from pipelines import suite
from pipelines.errors import UsageError
from pipelines.experiment import games
from pipelines.monitoring import display
from pipelines.monitoring.run_state import RunState
from pipelines.suites import directory, plan, room, scheduler, standing, table
from pipelines.suites.directory import SuiteDirectory
from pipelines.suites.scheduler import Entry, Scheduler
from pipelines.suites.standing import Figures, Stage
from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]


def sweep(**changes):
    values = {'games': ('pong',), 'presets': ('laptop',), 'seeds': (1,), 'grid': {}, 'flags': ()}
    return plan.Sweep(**{**values, **changes})


class TestPlan:
    def test_all_games_of_the_first_seed_come_first(self):
        runs = plan.expand(sweep(games=('pong', 'breakout'), seeds=(1, 2)))
        assert [run.name for run in runs] == [
            'pong-laptop-seed1',
            'breakout-laptop-seed1',
            'pong-laptop-seed2',
            'breakout-laptop-seed2',
        ]

    def test_a_grid_is_a_product_and_names_its_values(self):
        grid = plan.grid_of(['learning_rate=1e-4,3e-4', 'double_dqn=true,false'])
        runs = plan.expand(sweep(grid=grid))
        assert [run.name for run in runs] == [
            'pong-laptop-lr0.0001-ddtrue-seed1',
            'pong-laptop-lr0.0001-ddfalse-seed1',
            'pong-laptop-lr0.0003-ddtrue-seed1',
            'pong-laptop-lr0.0003-ddfalse-seed1',
        ]
        config = plan.prepare(runs)[3].config
        assert (config.parameter_server.learning_rate, config.agent.double_dqn) == (0.0003, False)
        assert config.environment.game == 'pong'

    def test_settings_with_the_same_initials_are_named_in_full(self):
        labels = plan.labels_of(['num_actors', 'num_atoms', 'loss'])
        assert labels == {'num_actors': 'num_actors', 'num_atoms': 'num_atoms', 'loss': 'loss'}

    def test_a_value_spelled_twice_is_one_run(self):
        grid = plan.grid_of(['learning_rate=1e-4,0.0001'])
        assert grid == {'learning_rate': (0.0001,)}
        assert plan.seeds_of('1..3,2,7') == (1, 2, 3, 7)
        assert games.games_of('pong,Pong,ALE/Pong-v5') == ('pong',)

    def test_two_spellings_of_a_command_have_the_same_flags(self):
        spaced = plan.joined(['--max_frames', '1e6', '--no-overlap_push'])
        assert spaced == plan.joined(['--max_frames=1e6', '--no-overlap_push'])

    def test_invalid_combinations_are_named_on_one_line(self):
        grid = plan.grid_of(['learning_rate=0,1e-4'])
        with pytest.raises(UsageError, match='^1 of 2 runs are invalid: pong-laptop-lr0.0-seed1: '):
            plan.prepare(plan.expand(sweep(grid=grid)))

    def test_an_error_of_all_runs_is_said_once(self):
        runs = plan.expand(sweep(games=('pong', 'breakout'), flags=('--max_frames=0',)))
        with pytest.raises(UsageError, match=r'^--max_frames 0: must be at least 1. Fix: [^:]*$'):
            plan.prepare(runs)

    def test_without_presets_each_game_has_its_own_and_a_name_that_is_one_directory(self):
        runs = plan.expand(sweep(games=('pong', 'CartPole-v1', 'MinAtar/Asterix-v1'), presets=()))
        assert [(run.name, run.preset) for run in runs] == [
            ('pong-laptop-seed1', 'laptop'),
            ('CartPole-v1-cart_pole-seed1', 'cart_pole'),
            ('MinAtar_Asterix-v1-minatar-seed1', 'minatar'),
        ]
        assert [plan.from_json(plan.to_json(run)) for run in runs] == runs

    def test_a_run_is_read_as_it_was_written(self):
        run = plan.expand(sweep(grid={'n_step': (3,)}, flags=('--max_frames=9',)))[0]
        assert plan.from_json(json.loads(json.dumps(plan.to_json(run)))) == run


class TestExtension:
    stored = plan.expand(sweep(seeds=(1, 2)))

    def test_games_and_seeds_can_be_added(self):
        asked = plan.expand(sweep(games=('pong', 'breakout'), seeds=(1, 2, 3)))
        assert plan.differing(self.stored, asked) == []
        assert plan.extended(self.stored, asked) == asked

    @pytest.mark.parametrize(
        ('changes', 'flags'),
        [
            ({'seeds': (1,)}, ['--seeds']),
            ({'games': ('breakout',)}, ['--games']),
            ({'presets': ('nature',), 'flags': ('--n_step=7',)}, ['--presets', '--n_step']),
            ({'grid': {'n_step': (1,)}}, ['--grid']),
            ({'flags': ('--max_frames=7', '--no-dueling')}, ['--max_frames', '--dueling']),
        ],
    )
    def test_fewer_runs_or_other_flags_are_named(self, changes, flags):
        asked = plan.expand(sweep(**{'seeds': (1, 2), **changes}))
        assert plan.differing(self.stored, asked) == flags

    def test_the_order_of_flags_is_no_difference(self):
        one, other = (
            ('--n_step=3', '--n_step=7', '--dueling'),
            ('--dueling', '--n_step=3', '--n_step=7'),
        )
        stored, asked = (plan.expand(sweep(flags=flags)) for flags in (one, other))
        assert plan.differing(stored, asked) == []
        assert plan.differing(stored, plan.expand(sweep(flags=other[::-1]))) == ['--n_step']


class TestGames:
    def test_the_groups_are_those_of_the_papers_and_can_be_played(self):
        assert len(games.games_of('atari49')) == 49
        assert len(games.games_of('atari5')) == 5
        # Phoenix is the only one of Atari-5 that the 49 lack.
        assert set(games.ATARI_5) - set(games.ATARI_49) == {'phoenix'}

    def test_the_list_has_every_game_and_fits(self):
        text = games.listing(80)
        assert '104 games' in text
        assert all(len(line) <= 80 for line in text.splitlines()[:-1])
        assert 'qbert 49,5' in text


@pytest.mark.parametrize(
    ('argv', 'told'),
    [
        ((), '--games: missing'),
        (('--games=nosuch',), "--games: unknown game 'nosuch'"),
        (('--games=,',), '--games: empty'),
        (('--games=pong,,breakout',), '--games pong,,breakout: a name is empty. Fix: '),
        (('--games=pong,', '--seeds=x'), '--games pong,: a name is empty. Fix: '),
        (('--games=pong', '--seeds=3..1'), '3..1 has 0 seeds'),
        (('--games=pong', '--seeds=x'), '--seeds x: not seeds'),
        (('--games=pong', '--seeds=1..'), '--seeds 1..: not seeds. Fix: write 1..3 or 1,2,5'),
        (('--games=pong', '--seeds=..3'), '--seeds ..3: not seeds. Fix: write 1..3 or 1,2,5'),
        (('--games=pong', '--grid=learningrate=3'), 'Fix: choose learning_rate'),
        (('--games=pong', '--grid=seed=1,2'), '--grid seed: not for a grid. Fix: use --seeds'),
        (('--games=pong', '--grid=n_step'), '--grid n_step: no values'),
        (('--games=pong', '--grid=n_step=1', '--grid=n_step=3'), '--grid n_step: given twice'),
        (('--games=pong', '--grid=double_dqn=1'), 'Fix: write true or false'),
        (('--games=pong', '--grid=n_step=1,3', '--n_step=3'), '--n_step: also in --grid'),
        (('--games=pong', '--game=breakout'), '--game=breakout: set for each run by the suite'),
        (('--games=pong', '--environment=x-v0'), '--environment=x-v0: set for each run by the su'),
        (('--games=pong', '--run_dir', 'x'), '--run_dir=x: set for each run by the suite'),
        (('--games=pong', '--replay_addresses=h:1'), '--replay_addresses: such servers hold'),
        (('--games=pong', '--nosuch=1'), '--nosuch=1: unknown flag'),
        (('--games=pong', 'stray'), 'stray: not a flag'),
        (('--games=pong', '--presets=laptop,x'), "--presets 'x': unknown. Fix: choose from laptop"),
        (('--games=pong', '--presets='), '--presets: empty. Fix: '),
        (('--games=pong', '--seeds='), '--seeds: empty. Fix: '),
        (('--games=pong', '--seeds=,'), '--seeds: empty. Fix: '),
        (('--games=pong', '--seeds=-1..1'), '--seeds -1..1: must be at least 0'),
        (('--games=pong', '--grid='), '--grid : no values. Fix: '),
        (('--games=pong', '--grid=n_step=x'), '--grid n_step=x: '),
        (('--games=pong', '--parallel='), "--parallel: '' is neither auto nor a number"),
        (('--games=nosuch', '--parallel=0'), "--parallel: '0' is neither auto nor a number"),
        (('--games=pong', '--suite_dir=gs://a/b'), '--suite_dir gs://a/b: not on this machine'),
        (('--games=pong', '--seeds=1..3', '--parallel=3', '--replay_capacity=1e12'), 'GiB of mem'),
        (('--resume',), '--resume: no suite given'),
        (('--resume', '--suite_dir=nosuch'), 'nosuch: holds no suite'),
        (('--resume', '--suite_dir=nosuch', '--seeds=3'), 'follows the plan of the suite'),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:  # by the parser, or with the returned code
        raise SystemExit(suite.main(argv))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count('\n') == 1
    assert not [*tmp_path.iterdir()]


# Runs the suite of its arguments; sends itself a signal after a step of the start.
STOPPED = """
import os, sys
from pipelines import suite
from pipelines.suites import directory, plan, scheduler
holder, name = {
    'prepare': (plan, 'prepare'),
    'open': (directory.SuiteDirectory, 'require_own'),
    'read': (scheduler.Scheduler, '__init__'),
    'write': (directory.SuiteDirectory, 'write'),
}[sys.argv[1]]
step = getattr(holder, name)
def signalled(*arguments):
    step(*arguments)
    os.kill(os.getpid(), int(sys.argv[2]))
setattr(holder, name, signalled)
sys.exit(suite.main(sys.argv[3:]))
"""


class TestSignal:
    def stopped(self, step, number, *flags):
        """Asserts that a signal after `step` ends the command on one line; returns that."""
        ended = subprocess.run(
            [sys.executable, '-c', STOPPED, step, str(int(number)), *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stderr) == (128 + number, '')
        return ended.stdout.splitlines()[-1]

    @pytest.mark.parametrize(
        ('step', 'number'),
        [
            ('prepare', signal.SIGINT),
            ('open', signal.SIGTERM),
            ('read', signal.SIGHUP),
            ('write', signal.SIGTERM),
        ],
    )
    def test_before_the_first_run_it_leaves_no_directory(self, step, number, tmp_path):
        suite_dir = tmp_path / 'suites' / 'new'
        line = self.stopped(step, number, '--games=pong', f'--suite_dir={suite_dir}')
        assert line == f'suite.py: {number.name}: stopped before anything was started'
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize('step', ['prepare', 'open', 'read'])
    def test_before_the_first_run_it_changes_no_earlier_suite(self, step, tmp_path):
        with SuiteDirectory.open(tmp_path) as opened:
            opened.write(plan.expand(sweep()), 'suite.py')
        before = (tmp_path / 'suite.json').read_bytes()
        flags = ('--games=pong', '--seeds=1,2', f'--suite_dir={tmp_path}')
        assert 'before anything was started' in self.stopped(step, signal.SIGINT, *flags)
        assert (tmp_path / 'suite.json').read_bytes() == before
        assert {file.name for file in tmp_path.iterdir()} == {'suite.json', '.lock'}

    def test_while_modules_are_imported_is_no_traceback(self, tmp_path):
        # In place of the first module that only this project's modules import.
        (tmp_path / 'decimal.py').write_text('import os; os.kill(os.getpid(), 2)\n')
        ended = subprocess.run(
            [sys.executable, str(ROOT / 'pipelines' / 'suite.py'), '--list_games'],
            env={**os.environ, 'PYTHONPATH': str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, '', '')


class TestDirectory:
    def test_a_plan_survives_and_a_damaged_one_is_refused(self, tmp_path):
        runs = plan.expand(sweep())
        with SuiteDirectory.open(tmp_path / 'suite') as opened:
            opened.write(runs, 'suite.py')
        assert directory.stored(tmp_path / 'suite') == runs
        file = tmp_path / 'suite' / 'suite.json'
        file.write_text(file.read_text().replace('laptop', 'nature'))
        with pytest.raises(UsageError, match='checksum'):
            directory.stored(tmp_path / 'suite')

    def test_a_command_with_other_flags_is_refused_on_one_line(self, tmp_path, capsys):
        with SuiteDirectory.open(tmp_path) as opened:
            opened.write(plan.expand(sweep(seeds=(1, 2))), 'suite.py')
        assert suite.main(['--games=pong', '--max_frames=9', f'--suite_dir={tmp_path}']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f'{tmp_path}: holds a suite with other --seeds, --max_frames. Fix: ' in line

    def test_two_suites_do_not_share_a_directory(self, tmp_path):
        program = (
            'import pathlib, sys; from pipelines.suites.directory import SuiteDirectory;'
            'held = SuiteDirectory.open(pathlib.Path(sys.argv[1])); print("held", flush=True);'
            'sys.stdin.read()'
        )
        with subprocess.Popen(
            [sys.executable, '-c', program, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == b'held\n'
            with pytest.raises(UsageError, match=f'in use by process {other.pid}'):
                SuiteDirectory.open(tmp_path)
            other.stdin.close()

    @pytest.mark.parametrize('flags', [('--games=pong',), ('--resume',)])
    @pytest.mark.parametrize('below', ['', 'x', 'x/y'])
    def test_a_file_in_its_place_is_named(self, below, flags, tmp_path, capsys):
        file = tmp_path / 'file'
        file.touch()
        assert suite.main([*flags, f'--suite_dir={file / below}']) == 2
        problem = f'suite.py: {file}: not a directory. Fix: choose another --suite_dir.\n'
        assert capsys.readouterr().err == problem

    def test_other_files_are_not_touched(self, tmp_path):
        (tmp_path / 'mine').touch()
        with pytest.raises(UsageError, match='no suite'):
            SuiteDirectory.open(tmp_path)

    def test_a_run_of_somebody_else_is_not_touched(self, tmp_path):
        runs = plan.expand(sweep())
        with SuiteDirectory.open(tmp_path / 'suite') as opened:
            opened.run(runs[0]).mkdir()
            with pytest.raises(UsageError, match='not made by this suite'):
                opened.require_own(runs)

    def test_the_same_command_finds_its_unfinished_suite(self, tmp_path):
        runs = plan.expand(sweep())
        with SuiteDirectory.open(tmp_path / 'suite-1') as opened:
            opened.write(runs, 'suite.py')
        assert directory.unfinished(tmp_path, runs) == tmp_path / 'suite-1'
        assert directory.unfinished(tmp_path, plan.expand(sweep(seeds=(2,)))) is None
        finish(tmp_path / 'suite-1' / runs[0].name, frames=0)
        assert directory.unfinished(tmp_path, runs) is None


def finish(path, frames, score=3.5, counted='frames', **rules):
    """Writes what a finished run leaves; `counted`: as what; `rules`: of its evaluation."""
    (path / 'policy').mkdir(parents=True)
    (path / 'config.json').write_text('{"environment": {"action_repeat": 4}}')
    result = {'protocol': 'noop', 'episodes': 2, 'epsilon': 0.05, 'mean': score, 'std': 0.0}
    result |= rules
    (path / 'evaluation.json').write_text(json.dumps(result))
    summary = {counted: frames, 'mean_return_100': -20.5, 'evaluation': result}
    (path / 'summary.json').write_text(json.dumps(summary))


class TestStanding:
    @pytest.mark.parametrize('counted', ['frames', 'agent_steps'])  # in Atari, elsewhere
    def test_a_run_is_done_once_trained_evaluated_and_exported(self, counted, tmp_path):
        assert standing.stage(tmp_path / 'run', 100) is Stage.NEW
        finish(tmp_path / 'run', frames=100, counted=counted)
        assert standing.stage(tmp_path / 'run', 100) is Stage.DONE
        assert standing.stage(tmp_path / 'run', 101) is not Stage.DONE
        recorded = standing.recorded(tmp_path / 'run', Figures())
        assert (recorded.frames, recorded.score) == (100, 3.5)
        (tmp_path / 'run' / 'policy').rmdir()
        assert standing.stage(tmp_path / 'run', 100) is not Stage.DONE

    def test_a_run_resumes_until_its_summary_holds_the_evaluation_at_its_budget(self, tmp_path):
        train(tmp_path, 24)  # 96 frames
        assert standing.stage(tmp_path, 100) is Stage.HALF
        finish(tmp_path, frames=96)
        assert standing.stage(tmp_path, 100) is Stage.HALF
        train(tmp_path, 25)
        assert standing.stage(tmp_path, 100) is Stage.HALF
        (tmp_path / 'policy').rmdir()
        finish(tmp_path, frames=100)
        assert standing.stage(tmp_path, 100) is Stage.DONE

    def test_a_run_with_unreadable_checkpoints_is_not_begun_anew(self, tmp_path):
        (tmp_path / 'checkpoints' / 'checkpoint-00000001').mkdir(parents=True)
        (tmp_path / 'checkpoints' / 'checkpoint-00000001' / 'run.json').write_text('{')
        (tmp_path / 'config.json').write_text('{}')
        assert standing.stage(tmp_path, 100) is Stage.HALF

    @pytest.mark.parametrize('unit', ['frames', 'steps'])
    def test_lines_of_a_run_give_its_figures(self, unit):
        lines = [
            '=== 2026-11-28 12:00:00 run.py',
            'run directory: /runs/a',
            '[0:00:00] starting servers',
            '[0:00:10] filling replay 3200/5000',
        ]
        assert standing.printed(lines, Figures()).phase == 'filling replay 3200/5000'
        state = RunState(
            *('pong', 'laptop', 3_000_000),
            frames=505_632,
            frames_per_second=1023.4,
            mean_return_100=-16.01,
            unit=unit,
        )
        lines.append(f'[0:08:02] {display.state_line(state, "training")}')
        expected = Figures('training', 505_632, -16.01, None, 1023.0)
        assert standing.printed(lines, Figures()) == expected
        lines.append('[0:08:03] actor 0: ended with exit code 1, failure 1 in a row; restarting')
        assert standing.printed(lines, Figures()) == expected
        for phase in ('evaluating 3/30', 'filming 12 s'):
            lines.append(f'[0:52:37] {phase}')
            assert standing.printed(lines, Figures()).phase == phase


# Stands for run.py: does what its seed says, and appends its arguments to a file.
FAKE = """
import json, pathlib, sys, time
argv = dict(a.partition('=')[::2] for a in sys.argv[1:])
path = pathlib.Path(argv['--run_dir'])
with open(path.parent / 'calls', 'a') as calls:
    print(path.name, '--resume' in argv, file=calls)
if argv['--seed'] == '2':
    print('run.py: no luck', flush=True)
    sys.exit(1)
if argv['--seed'] == '3':
    sys.exit(130)
if argv['--seed'] == '4':
    try:
        print('[0:00:00] training', flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
(path / 'policy').mkdir(parents=True, exist_ok=True)
(path / 'config.json').write_text('{"environment": {"action_repeat": 4}}')
result = {'protocol': 'noop', 'episodes': 2, 'epsilon': 0.0, 'mean': 1.0, 'std': 0.0}
(path / 'evaluation.json').write_text(json.dumps(result))
(path / 'summary.json').write_text(json.dumps({'frames': 100, 'evaluation': result}))
"""


def train(path, steps):
    """Writes what a run leaves that was killed after so many agent steps."""
    checkpoint = path / 'checkpoints' / 'checkpoint-00000001'
    checkpoint.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text('{"environment": {"action_repeat": 4}}')
    (checkpoint / 'run.json').write_text(json.dumps(seal({'updates': 1, 'agent_steps': steps})))


@pytest.fixture
def conducted(tmp_path, monkeypatch):
    """Runs a plan with a fake run.py to its end; returns entries, calls and messages."""
    fake = tmp_path / 'fake.py'
    fake.write_text(FAKE)
    original = Scheduler._spec

    def spec(self, entry, stage):
        made = original(self, entry, stage)
        assert made.argv[1:3] == ['-m', 'pipelines.run']
        return types.SimpleNamespace(
            **{**vars(made), 'argv': [sys.executable, str(fake), *made.argv[3:]]}
        )

    monkeypatch.setattr(Scheduler, '_spec', spec)

    def conduct(runs, parallel=1, interrupt=lambda running: False):
        told: list[str] = []
        with (
            SuiteDirectory.open(tmp_path / 'suite') as opened,
            Scheduler(opened, runs, parallel, told.append) as running,
        ):
            opened.write(runs, 'suite.py')

            def ended():
                running.poll()
                if not running.stopping and interrupt(running):
                    running.interrupt()
                return not running.active

            assert eventually(ended, 60.0)
        calls = (tmp_path / 'suite' / 'calls').read_text().splitlines()
        return running.entries, calls, told

    return conduct


def test_a_failed_run_is_tried_once_more_after_the_others_and_named(conducted):
    runs = plan.expand(sweep(seeds=(2, 1), flags=('--max_frames=100',)))
    entries, calls, told = conducted(runs)
    assert [entry.state for entry in entries] == [scheduler.FAILED, scheduler.DONE]
    assert calls == [f'pong-laptop-seed{seed} False' for seed in (2, 1, 2)]
    assert entries[0].reason == 'no luck'
    assert 'tried once more later' in told[0]
    assert str(entries[0].log) in told[1]
    # Started again: the finished run is not repeated, the failed one is.
    _, calls, _ = conducted(runs)
    assert [call.split()[0][-1] for call in calls] == ['2', '1', '2', '2', '2']


def test_a_run_stopped_by_its_user_is_not_started_again(conducted):
    entries, calls, _ = conducted(plan.expand(sweep(seeds=(3, 1))), parallel=2)
    assert [entry.state for entry in entries] == [scheduler.FAILED, scheduler.DONE]
    assert entries[0].reason == 'stopped by SIGINT'
    assert len(calls) == 2


def test_ctrl_c_reaches_the_active_run_and_nothing_else_starts(conducted):
    def training(running):
        return running.entries[0].figures.phase == 'training'

    runs = plan.expand(sweep(seeds=(4, 1)))
    entries, calls, told = conducted(runs, interrupt=training)
    assert [entry.state for entry in entries] == [scheduler.STOPPED, scheduler.WAITING]
    assert (len(calls), told) == (1, [])


def test_a_run_killed_while_it_evaluated_resumes_and_is_not_done_before(tmp_path, conducted):
    (run,) = plan.expand(sweep(flags=('--max_frames=100',)))
    path = tmp_path / 'suite' / run.name
    with SuiteDirectory.open(tmp_path / 'suite') as opened:
        opened.write([run], '')
    train(path, steps=25)
    finish(path, frames=0)  # evaluated, without a summary
    (path / 'summary.json').unlink()
    entries, calls, _ = conducted([run])
    assert calls == [f'{run.name} True']
    assert entries[0].state == scheduler.DONE


@contextlib.contextmanager
def in_use(directory, run):
    """A scheduler of a run in whose directory another process still is, and its entry."""
    with SuiteDirectory.open(directory) as opened:
        opened.write([run], '')
        (directory / run.name).mkdir()
        with lock(directory / run.name), Scheduler(opened, [run], 1, print) as running:
            yield running, running.entries[0]


def test_a_run_waits_for_the_process_of_a_killed_suite(tmp_path, conducted):
    (run,) = plan.expand(sweep())
    with in_use(tmp_path / 'suite', run) as (running, entry):
        running.poll()
        assert entry.state == scheduler.WAITING
        assert 'and what it has started end' in table.state(entry)
    entries, calls, _ = conducted([run])
    assert entries[0].state == scheduler.DONE
    assert len(calls) == 1


def test_a_run_killed_late_in_a_suite_waits_for_what_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, 'END_SECONDS', 1.0)
    (run,) = plan.expand(sweep())
    with in_use(tmp_path / 'suite', run) as (running, entry):
        entry.started = time.monotonic()
        entry.seconds, entry.attempts = 3600.0, 1  # an hour later it was killed
        time.sleep(1.1)
        running.poll()
        assert entry.state == scheduler.WAITING
        entry.seconds = 0.0
        running.poll()
        assert entry.state == scheduler.FAILED


def entry(name, state, **figures):
    run = plan.Run(name, 'pong', 'laptop', 1, max_frames=1000)
    made = Entry(run, pathlib.Path(name), pathlib.Path('log'), state)
    made.figures = Figures(**figures)
    return made


class TestTable:
    def test_a_small_terminal_shows_active_and_failed_runs_first(self):
        entries = [
            entry('a', scheduler.DONE),
            entry('b', scheduler.FAILED),
            entry('c', scheduler.WAITING),
            entry('d', scheduler.RUNNING),
        ]
        assert [e.run.name for e in table.visible(entries, 2)] == ['b', 'd']
        assert [e.run.name for e in table.visible(entries, 9)] == ['a', 'b', 'c', 'd']

    def test_the_time_left_is_that_of_all_runs(self):
        entries = [
            entry('a', scheduler.RUNNING, frames=500, frames_per_second=10.0),
            entry('b', scheduler.WAITING),
            entry('c', scheduler.DONE, frames=1000),
        ]
        entries[0].seconds = 60.0  # it took 10 s to start
        # 500 and 1000 frames at 10/s, in turn or side by side.
        assert table.eta_seconds(entries, 1) == 150.0
        assert table.eta_seconds(entries, 2) == 100.0
        assert table.eta_seconds(entries, 3) == 100.0

    def test_the_time_left_includes_evaluation_and_video_once_a_run_has_finished(self):
        entries = [
            entry('a', scheduler.DONE, frames=1000, frames_per_second=10.0),  # 100 s of 250 s
            entry('b', scheduler.RUNNING, frames=1000, phase='filming 12 s'),
            entry('c', scheduler.WAITING, frames=600),
            entry('d', scheduler.DONE, frames=1000),  # had only its end left
        ]
        seconds = {'a': 250.0, 'b': 190.0, 'd': 99.0}
        for each in entries:
            each.seconds = seconds.get(each.run.name, 0.0)
        entries[3].frames_before = 1000
        # A frame takes 0.25 s: b needs 250 s - 190 s, c 400 frames.
        assert table.eta_seconds(entries, 1) == 160.0
        assert table.line(entries[1], table.pace(entries)).endswith(
            'filming 12 s | frames 1,000/1,000 | return - | score - | eta 0:01:00'
        )

    def test_runs_outside_atari_count_steps(self):
        run = plan.Run('a', 'CartPole-v1', 'cart_pole', 1, max_frames=1000)
        made = Entry(run, pathlib.Path('a'), pathlib.Path('log'), scheduler.RUNNING)
        made.figures = Figures(frames=500)
        assert ' | steps 500/1,000 | ' in table.line(made)
        shown = table.Table()
        for entries, unit in (([made], 'steps'), ([made, entry('b', scheduler.DONE)], 'frames, ')):
            shown.update(display.PlainDisplay(io.StringIO()), entries, 1)
            head = io.StringIO()
            rich.console.Console(file=head, width=120).print(shown.render(None, '', 0.0, 120, 20))
            assert f' {unit}' in head.getvalue()

    def test_the_rules_of_the_scores_are_said_once_if_they_are_the_same(self, tmp_path, capsys):
        rules = {'max_frames': 18_000, 'deviations': {'episodes': 2}}
        entries = [entry('a', scheduler.DONE), entry('b', scheduler.DONE)]
        for each in entries:
            finish(tmp_path / each.run.name, frames=1000, **rules)
            each.figures = standing.recorded(tmp_path / each.run.name, Figures())
        said = 'scores: protocol noop, epsilon 0.05, at most 18,000 frames; deviations: episodes 2'
        assert suite.outcome([*entries, entry('c', scheduler.DONE)], tmp_path, 1, None) == 0
        assert capsys.readouterr().out.splitlines().count(said) == 1
        finish(tmp_path / 'old', frames=1000)  # of a version that did not record them
        entries[0].figures = standing.recorded(tmp_path / 'old', Figures())
        told = 'scores: each by the rules in the summary.json of its run'
        for some in (entries, entries[:1]):
            assert table.rules(some) == [told]
        assert table.rules([entry('a', scheduler.WAITING)]) == []

    def test_it_fits_80_columns(self):
        from rich.console import Console

        shown = table.Table()
        entries = [
            entry('a', scheduler.RUNNING, frames=430, phase='training', mean_return=-20.5),
            entry('b', scheduler.FAILED),
        ]
        entries[1].reason = 'a long reason ' * 10
        console = Console(width=120, record=True, color_system=None, file=io.StringIO())
        shown.update(display.PlainDisplay(io.StringIO()), entries, 1)
        console.print(shown.render(None, '', 3700.0, 120, 24))
        lines = console.export_text().splitlines()
        assert {len(line) for line in lines} == {80}
        assert any('training 43%' in line and '-20.5' in line for line in lines)
        assert '0 of 2 done, 1 failed' in lines[-1]


def test_one_run_is_no_plural(monkeypatch, tmp_path, capsys):
    assert suite.outcome([entry('a', scheduler.DONE)], tmp_path, 1, None) == 0
    assert '1 of 1 run is done, 0 failed' in capsys.readouterr().out
    told: list[str] = []
    running = types.SimpleNamespace(stopping=False, of=lambda _: [1], interrupt=lambda: None)
    suite._stop(running, told.append)  # type: ignore[arg-type]
    running.stopping = True
    suite._stop(running, told.append)  # type: ignore[arg-type]
    assert told == [
        'stopping 1 run after a last checkpoint; once more stops at once',
        'stopping 1 run at once, without a checkpoint',
    ]
    prepared = plan.prepare(plan.expand(sweep()))
    monkeypatch.setattr(room, 'free_disk', lambda _: 0)
    with pytest.raises(UsageError, match='0.0 GiB of disk free, 1 run needs'):
        room.require_room(prepared, 1, tmp_path)
    monkeypatch.setattr(room, 'available_memory', lambda: 0)
    with pytest.raises(UsageError, match='1 run needs .* Fix: choose a smaller --replay_capacity'):
        room.require_room(prepared, 1, tmp_path)


def test_as_many_runs_at_once_as_cores_and_memory_allow(monkeypatch):
    two_actors = sweep(seeds=(1, 2, 3, 4), flags=('--num_actors=2',))
    prepared = plan.prepare(plan.expand(two_actors))  # three workers each
    monkeypatch.setattr(room, 'whole_cores', lambda: 9)
    need = room.memory_bytes(prepared[0].config, prepared[0].launch)
    for memory, runs in ((10 * need, 3), (2 * need, 2), (need // 2, 1)):
        monkeypatch.setattr(room, 'available_memory', lambda memory=memory: memory)
        assert room.most_at_once(prepared) == runs
    monkeypatch.setattr(room, 'available_memory', lambda: 4 * need)
    (warning,) = room.require_room(prepared, 4, pathlib.Path())
    assert '4 runs of 3 workers share 9 cores' in warning
    monkeypatch.setattr(room, 'whole_cores', lambda: 3)
    with pytest.raises(UsageError, match='4 runs at once exceed 3 cores. Fix: choose at most 3'):
        room.require_room(prepared, 4, pathlib.Path())
    assert suite.at_once(10**9, prepared) == 4
