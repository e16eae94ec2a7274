"""The evaluator of an active run: snapshots of real parameters, the best kept, a bounded cost."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from infra.parameter_server.checkpoint import read_checkpoint
from infra.process import own_code
from pipelines import evaluator
from pipelines.evaluation.allowance import Allowance, level_after
from pipelines.evaluation.policies import of_run
from pipelines.experiment import builders, presets
from pipelines.experiment import config as config_lib
from pipelines.launch import evaluator as launch_evaluator
from pipelines.storage.checkpoints import Checkpoints
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.snapshots import WORK, Snapshot, Snapshots, is_best, keep_best, read_best
from tests.support import parameter_servers
from tests.support.waiting import eventually, has_ended, pause

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    'torso': 'dqn2013_half',
    'evaluation_max_frames': 80,
    'evaluator_episodes': 2,
    'evaluation_period_updates': 1,
    'evaluator_cpu_share': 1.0,
}


SHOOTING = {'game': 'demon_attack', 'evaluation_max_frames': 400, 'evaluation_epsilon': 0.0}
FIRE = 1  # index of the action


class Run:
    """A run's directory and its parameter shards; `save` writes what the launcher would."""

    def __init__(self, directory, checkpoints, client):
        self.directory, self.client = directory, client
        self._checkpoints = checkpoints

    def push(self, gradient=1.0, times=1):
        gradient = np.full(self.client.layout.size, gradient, np.float32)
        for _ in range(times):
            assert self.client.push(gradient, self.client.pull().version).rejected is None

    def save(self, whole=False, gradient=1.0):
        """One more update, saved; prunes what is older than the newest two."""
        self.push(gradient)
        if whole:
            self._checkpoints.save(self.client, (), {'updates': self.client.pull().version})
        else:
            self._checkpoints.save_parameters(self.client)

    def damage_newest(self):
        newest = max((self.directory.path / 'servers').glob('parameters-*'))
        part = next(newest.glob('*.data-*'))
        part.write_bytes(part.read_bytes()[:-8])


@contextlib.contextmanager
def opened(tmp_path, layout, parameters=0.0, average_updates=0, **settings):
    config = presets.experiment('laptop', SETTINGS | settings)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(tmp_path / 'run'))
        directory.config_file.write_text(config_lib.to_json(config))
        server = parameter_servers.config(average_updates=average_updates)
        shards = stack.enter_context(parameter_servers.serve(server))
        addresses = [shard.address for shard in shards]
        client = stack.enter_context(parameter_servers.connect(addresses, layout))
        client.initialise(np.full(client.layout.size, parameters, np.float32))
        yield Run(directory, Checkpoints(directory, config), client)


@pytest.fixture
def run(tmp_path):
    with opened(tmp_path, parameter_servers.LAYOUT) as run:
        yield run


def taken(snapshots, least_updates) -> Snapshot:
    snapshot = snapshots.take(least_updates)
    assert snapshot is not None
    return snapshot


def updates_of(snapshots, least_updates) -> int:
    return taken(snapshots, least_updates).checkpoint.clock['updates']


class TestAllowance:
    def test_gains_with_time_and_loses_what_is_used(self):
        # 0.5 + 0.06 x 10 - 0.3
        assert level_after(0.5, 10.0, 0.3, rate=0.06) == pytest.approx(0.8)

    def test_saves_up_two_cpu_seconds_at_most(self):
        assert level_after(0.0, 3_600.0, 0.5, rate=0.06) == 1.5

    def test_start_and_debt_are_paid_off_before_work_begins(self):
        now, used = [100.0], [6.0]
        allowance = Allowance(0.1, 3.0, lambda: now[0], lambda: used[0])
        assert allowance.pause_seconds() == pytest.approx(90.0)  # (3 + 6) / 0.1
        now[0] += 80.0
        assert allowance.pause_seconds() == pytest.approx(10.0)
        now[0] += 11.0
        assert allowance.pause_seconds() == 0.0

    def test_bounds_the_share_over_any_time(self):
        now, used = [0.0], [0.0]
        allowance = Allowance(0.06, 0.0, lambda: now[0], lambda: used[0])
        looks = [(0.0, 0.0)]
        for step in range(20_000):  # each of 2 ms CPU time; 20 s without work after 1,000
            pause = allowance.pause_seconds() + 20.0 * (step % 1_000 == 999)
            now[0] += pause + 0.002
            used[0] += 0.002
            looks.append((now[0], used[0]))
        for (begin, before), (end, after) in zip(looks[::7], looks[3_000::7]):
            assert after - before <= 0.06 * (end - begin) + 2.0 + 0.002
        assert used[0] > 0.9 * (0.06 * now[0] - 2.0)  # and is used


class TestSnapshots:
    def test_are_of_the_newest_parameters_however_they_were_saved(self, run):
        snapshots = Snapshots(run.directory, since=0.0)
        assert snapshots.take(1) is None
        run.save(whole=True)
        assert updates_of(snapshots, 1) == 1
        run.save()
        assert updates_of(snapshots, 2) == 2
        assert snapshots.take(3) is None

    def test_survive_the_pruning_of_their_origin(self, run):
        snapshots = Snapshots(run.directory, since=0.0)
        run.save()
        first = taken(snapshots, 1)
        for _ in range(3):
            run.save()
        assert len(list((run.directory.path / 'servers').glob('parameters-*'))) == 2
        assert read_checkpoint(str(first.path)).clock['updates'] == 1

    def test_skip_a_damaged_directory_and_take_the_one_before(self, run):
        snapshots = Snapshots(run.directory, since=0.0)
        run.save()
        run.save()
        run.damage_newest()
        assert updates_of(snapshots, 1) == 1
        assert snapshots.take(2) is None
        run.save()
        assert updates_of(snapshots, 2) == 3

    @pytest.mark.parametrize('moment', ['before', 'while'])
    def test_skip_a_directory_that_vanishes(self, run, monkeypatch, moment):
        run.save()
        run.save()
        newest = max((run.directory.path / 'servers').glob('parameters-*'))
        link = os.link

        def vanish(source, target):
            if newest.exists() and moment == 'before':
                shutil.rmtree(newest)
            link(source, target)
            if newest.exists():
                newest.rename(newest.with_name('.gone'))  # as `infra.disk.remove` begins

        monkeypatch.setattr(os, 'link', vanish)
        assert updates_of(Snapshots(run.directory, since=0.0), 1) == 1

    def test_ignore_what_an_earlier_launch_left(self, run):
        run.save()
        saved = next((run.directory.path / 'servers').glob('parameters-*/manifest.json'))
        snapshots = Snapshots(run.directory, since=saved.stat().st_mtime + 0.001)
        assert snapshots.take(1) is None

    def test_are_copied_where_there_are_no_hard_links(self, run, monkeypatch):
        def refuse(*_):
            raise OSError(95, 'Operation not supported')

        monkeypatch.setattr(os, 'link', refuse)
        run.save()
        assert updates_of(Snapshots(run.directory, since=0.0), 1) == 1


class TestTheBest:
    def test_is_kept_while_checkpoints_are_pruned(self, run):
        snapshots = Snapshots(run.directory, since=0.0)
        run.save(whole=True)
        first = taken(snapshots, 1)
        keep_best(run.directory, first.path, {'mean': 3.0})
        expected = first.checkpoint.parameters.copy()
        for _ in range(3):
            run.save(whole=True)
            snapshots.take(1)
        names = [path.name for path in run.directory.latest_checkpoints()]
        assert names == ['checkpoint-00000004', 'checkpoint-00000003']
        best = of_run(str(run.directory.path), 'best', print)
        assert best.parameters is not None
        assert (best.checkpoint, best.updates) == ('best', 1)
        np.testing.assert_array_equal(best.parameters, expected)
        assert read_best(run.directory) == {'mean': 3.0}

    def test_plays_with_the_average_if_the_shards_keep_one(self, tmp_path):
        start = np.zeros(parameter_servers.LAYOUT.size)
        with opened(tmp_path, parameter_servers.LAYOUT, start, average_updates=100) as run:
            run.push(gradient=0.0, times=10)  # the tenth enters the average
            run.save(whole=True, gradient=1.0)
            keep_best(run.directory, taken(Snapshots(run.directory, 0.0), 1).path, {'mean': 3.0})
            best = of_run(str(run.directory.path), 'best', print)
        assert best.parameters is not None
        np.testing.assert_array_equal(best.parameters, start)

    def test_is_ignored_if_damaged(self, run):
        run.save()
        keep_best(run.directory, taken(Snapshots(run.directory, 0.0), 1).path, {'mean': 3.0})
        next((run.directory.best / 'parameters').glob('*.index')).unlink()
        assert read_best(run.directory) is None

    def test_is_the_newer_of_equal_ones(self):
        rules = {'protocol': 'noop', 'epsilon': 0.05, 'max_frames': 80}
        best = {**rules, 'episodes': 2, 'mean': 3.0, 'updates': 7}
        assert is_best(best, None)
        assert is_best({**rules, 'mean': 3.0, 'updates': 8}, best)
        assert not is_best({**rules, 'mean': 2.9, 'updates': 8}, best)
        assert is_best({**rules, 'mean': 2.9, 'updates': 7}, best)
        # Scores of longer games do not compare.
        assert is_best({**rules, 'max_frames': 800, 'mean': 2.9, 'updates': 8}, best)


def test_games_have_the_same_seed_at_each_evaluation_and_another_than_the_final_one(tmp_path):
    played = []
    pace = evaluator.Pace(Allowance(1.0), tmp_path / 'alive')
    for seed in (1, 2):
        config = presets.experiment('laptop', {**SETTINGS, 'seed': seed})
        with RunDirectory.open(tmp_path / f'run{seed}') as directory:
            for _ in range(2):
                made = evaluator.Evaluator(directory, config, pace, 0.0, 0.0, 0)
                played.append(made._seed)
    assert played[0] == played[1]
    assert played[2] == played[3]
    assert len({1, 2, *played}) == 4


def test_a_line_cut_by_a_kill_costs_no_other(tmp_path):
    file = tmp_path / 'evaluations.jsonl'
    evaluator.append_line(file, {'mean': 1.0})
    with file.open('a') as stream:
        stream.write('{"mean": 2')
    evaluator.append_line(file, {'mean': 3.0})
    assert file.read_text() == '{"mean": 1.0}\n{"mean": 2\n{"mean": 3.0}\n'


STAND_IN = """import os, pathlib, sys, time
if 'pipelines.evaluator' in sys.orig_argv:
    {act}
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """An `EvaluatorProcess` by what its process does instead of evaluating, and its messages."""
    monkeypatch.setattr(launch_evaluator, '_BACK_OFF_SECONDS', 0.0)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    config = presets.experiment('laptop', SETTINGS)
    with RunDirectory.open(tmp_path / 'run') as directory, contextlib.ExitStack() as stack:

        def start(act):
            (tmp_path / 'sitecustomize.py').write_text(STAND_IN.format(act=act))
            told: list[str] = []
            process = launch_evaluator.EvaluatorProcess(config, directory, 0.0, told.append)
            stack.callback(process.close)
            return process, told

        yield start


def look(process, number=0):
    process.look(5, 0, number)
    return process.pid


class TestEvaluatorProcess:
    def test_starts_when_the_first_evaluation_is_due(self, launched):
        process, _ = launched('time.sleep(600)')
        process.look(0, 0, 0)
        assert process.pid is None
        process.look(1, 0, 0)
        assert process.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19

    def test_is_restarted_after_a_kill_and_its_cpu_time_stays_counted(self, launched):
        process, told = launched('sum(range(10_000_000)); time.sleep(600)')
        killed = look(process)
        assert eventually(lambda: look(process) and process.cpu_seconds >= 0.1)
        used = process.cpu_seconds
        os.kill(killed, signal.SIGKILL)
        assert eventually(lambda: look(process) not in (killed, None))
        assert told[0].startswith('evaluator: was ended by SIGKILL, failure 1 in a row (5 end')
        assert process.cpu_seconds >= used

    def test_that_hangs_is_killed_and_restarted(self, launched, monkeypatch):
        monkeypatch.setattr(launch_evaluator, '_HUNG_SECONDS', 1.0)
        process, told = launched('time.sleep(600)')
        hung = look(process)
        pause(hung)
        assert eventually(lambda: look(process) not in (hung, None))
        assert told[0] == 'evaluator: no sign of life for 1 s, killed'

    def test_that_fails_again_and_again_is_given_up_in_one_line(self, launched):
        process, told = launched('print("OSError: no licence", flush=True); os._exit(3)')
        assert eventually(lambda: look(process) is None and len(told) == 5)
        assert told[0].startswith(
            'evaluator: ended with exit code 3 (OSError: no licence), failure 1 in a row (5 end the'
        )
        assert told[4].startswith(
            'evaluator: failed 5 times in a row (last: ended with exit code 3'
        )
        assert 'training continues without evaluations; log: ' in told[4]
        assert look(process) is None

    def test_that_scores_in_between_is_not_given_up(self, launched):
        process, told = launched('os._exit(3)')
        assert eventually(lambda: look(process, number=len(told)) and len(told) == 7)
        assert all('failure 1 in a row' in text for text in told)

    def test_that_cannot_start_costs_no_training(self, launched, monkeypatch):
        process, told = launched('time.sleep(600)')
        monkeypatch.setattr(sys, 'executable', '/nonexistent')
        assert look(process) is None
        assert told[0].startswith('evaluator: unexpected FileNotFoundError')

    def test_that_hangs_delays_no_end(self, launched):
        process, _ = launched('time.sleep(600)')
        pid = look(process)
        pause(pid)
        before = time.monotonic()
        process.stop()
        process.close()
        assert time.monotonic() - before < 10.0
        assert has_ended(pid)
        assert look(process) is None

    def test_dates_the_launch_by_the_clock_of_the_file_system(self, launched, monkeypatch):
        monkeypatch.setattr(time, 'time', lambda: 4e9)  # another machine's, 2096
        before = time.time_ns() / 1e9
        process, _ = launched('time.sleep(600)')
        assert before - 1.0 < process._since < before + 10.0
        assert process._origin == process._since

    def test_is_off_without_a_share(self, tmp_path):
        config = presets.experiment('laptop', {**SETTINGS, 'evaluator_cpu_share': 0.0})
        with RunDirectory.open(tmp_path / 'run') as directory:
            process = launch_evaluator.EvaluatorProcess(config, directory, 0.0, print)
            assert look(process) is None


def rows(run_dir) -> list[dict]:
    file = run_dir / 'evaluations.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_an_evaluator_keeps_the_best_of_the_snapshots_until_it_is_asked_to_end(tmp_path):
    policy = builders.build_policy(presets.experiment('laptop', SETTINGS | SHOOTING))
    layout = builders.layout_of(policy)
    # The bias of FIRE alone is above 0. The biases of the actions lie before the last kernel.
    fire = np.zeros(layout.size, np.float32)
    *before, bias, _ = policy.variables
    assert bias.shape == (6,)
    fire[sum(variable.shape.num_elements() for variable in before) + FIRE] = 1e-6
    with opened(tmp_path, layout, fire, average_updates=100, **SHOOTING) as run:
        path = run.directory.path
        run.push(gradient=0.0, times=10)
        # The newest does nothing any more; the average, still that of the tenth update, shoots.
        run.save(gradient=np.sign(fire))
        with (tmp_path / 'log').open('w') as log:
            process = subprocess.Popen(
                [sys.executable, '-m', 'pipelines.evaluator', str(path), '--origin=0'],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, **own_code('')},
            )
        try:
            told = (tmp_path / 'log').read_text
            assert eventually(lambda: len(rows(path)) == 1, 90.0), told()
            run.push(gradient=0.0, times=8)
            # The bias of FIRE, 1e-6 at update 10 and -1 at 20, has an average of -0.5.
            run.save(whole=True, gradient=0.0)
            assert eventually(lambda: len(rows(path)) == 2, 30.0), told()
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(10)
        assert code == 0, told()
        first, second = rows(path)
        assert (first['updates'], second['updates']) == (11, 20)
        assert (first['episodes'], first['protocol'], first['epsilon']) == (2, 'noop', 0.0)
        assert len(first['returns']) == 2
        assert first['wall_seconds'] == pytest.approx(first['time'], abs=60)  # the origin is 1970
        assert first['mean'] > 0.0 == second['mean']  # 20 and 20; without a shot nothing
        assert (first['best'], second['best']) == (True, False)
        assert json.loads((run.directory.best / 'evaluation.json').read_text()) == first
        assert of_run(str(path), 'best', print).updates == 11
        assert sorted(entry.name for entry in (path / WORK).iterdir()) == [
            '.lock',
            'alive',
            'parameters',
        ]
