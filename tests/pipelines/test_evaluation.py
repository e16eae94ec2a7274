"""Evaluation games: what a protocol changes, and what a game's score depends on."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline

from agents.config import EnvironmentConfig
from infra.process import descendants
from pipelines.engines import catalog
from pipelines.errors import UsageError
from pipelines.evaluation import local, policies, results, starts
from pipelines.evaluation.bounded import HungError, within
from pipelines.evaluation.play import CancelledError, Failure, Game, Score, Step, play
from pipelines.evaluation.players import Players
from pipelines.evaluation.policies import Policy, of_chance
from pipelines.evaluation.starts import Start, StartFile
from pipelines.experiment import presets
from pipelines.experiment.protocols import PROTOCOLS, Protocol, deviations, protocol
from pipelines.launch import beam_job, evaluation_job, interrupts
from pipelines.launch.interrupts import Ended, handled, raise_ended
from pipelines.transforms.evaluate import Evaluate, Shared, Write, read_json, write_json
from tests.support.waiting import eventually, has_ended

SHORT = Protocol('noop', epsilon=0.5, max_frames=400)
PONG = EnvironmentConfig(game='pong')


def game(episode=0, rules=SHORT, environment=PONG, **values) -> Game:
    return Game(0, episode, 7, environment, rules, **values)


def steps_of(played: Game, act=lambda _: 0) -> list[Step]:
    steps: list[Step] = []
    play(played, act, steps.append)
    return steps


class TestProtocols:
    def test_are_those_of_their_papers(self):
        noop, human = PROTOCOLS['noop'], PROTOCOLS['human']
        assert (noop.episodes, noop.max_noops, noop.max_frames, noop.epsilon) == (
            30,
            30,
            18_000,
            0.05,
        )
        assert (human.episodes, human.max_frames, human.starts) == (100, 108_000, True)
        machado = PROTOCOLS['machado']
        assert (machado.sticky_action_probability, machado.full_action_space) == (0.25, True)
        assert machado.max_frames == PROTOCOLS['rainbow'].max_frames == 108_000

    def test_replace_the_rules_of_training_but_not_what_the_network_needs(self):
        trained = EnvironmentConfig(
            game='breakout', frame_stack=2, max_noops=3, sticky_action_probability=0.1
        )
        rules = PROTOCOLS['noop'].environment(trained)
        assert (rules.game, rules.frame_stack) == ('breakout', 2)
        assert (rules.max_noops, rules.sticky_action_probability) == (30, 0.0)
        assert not rules.life_loss_ends_episode

    def test_say_where_an_evaluation_deviates(self):
        changed = protocol('noop', {'epsilon': 0.1, 'max_frames': None, 'episodes': 3})
        assert deviations(changed, PONG) == {'epsilon': 0.1, 'episodes': 3}  # noop: 0.05, 30 games
        assert deviations(protocol('noop', {'episodes': 31}), PONG) == {}
        assert deviations(protocol('rainbow', {'epsilon': 0.0}), PONG) == {}  # Ape-X's

    def test_say_that_a_policy_acts_otherwise_than_the_published_ones(self):
        other = dataclasses.replace(PONG, action_repeat=1, full_action_space=True)
        expected = {'action_repeat': 1, 'full_action_space': True}
        assert deviations(PROTOCOLS['noop'], other) == expected
        assert deviations(PROTOCOLS['machado'], PONG) == {'full_action_space': False}

    def test_are_known_by_name(self):
        with pytest.raises(UsageError, match='choose one of noop, human, machado, rainbow'):
            protocol('mine', {})


class TestAGame:
    def test_depends_on_its_description_alone(self):
        first, other = play(game(0), lambda _: 2), play(game(1), lambda _: 2)
        assert play(game(0), lambda _: 2) == first
        assert other != first

    def test_is_cut_at_the_limit_which_no_ops_do_not_count_to(self):
        scores = [play(game(episode), lambda _: 0) for episode in range(3)]
        assert [(score.frames, score.cut) for score in scores] == [(400, True)] * 3
        assert len(steps_of(game())) == 100  # of four frames

    def test_starts_after_different_numbers_of_no_ops(self):
        rules = dataclasses.replace(SHORT, epsilon=0.0)  # games differ by nothing else
        later = [steps_of(game(episode, rules))[-1].observation.tobytes() for episode in range(4)]
        assert len(set(later)) > 1

    def test_of_epsilon_one_never_asks_the_policy(self):
        def act(_):
            raise AssertionError

        rules = dataclasses.replace(SHORT, epsilon=1.0)
        actions = [step.action for step in steps_of(game(rules=rules), act)]
        assert set(actions) == set(range(6))  # Pong's minimal set

    def test_of_epsilon_zero_asks_it_at_every_step(self):
        rules = dataclasses.replace(SHORT, epsilon=0.0)
        assert {step.action for step in steps_of(game(rules=rules), lambda _: 3)} == {3}

    def test_shows_stacked_frames(self):
        observations = [step.observation for step in steps_of(game())]
        assert observations[0].shape == (1, 84, 84, 4)
        assert not observations[0][..., :3].any()  # before the first frame: zero
        np.testing.assert_array_equal(observations[5][..., 0], observations[2][..., 3])

    def test_goes_on_after_a_lost_life(self):
        rules = dataclasses.replace(SHORT, max_frames=4_000, max_noops=0, epsilon=1.0)
        breakout = EnvironmentConfig(game='breakout')
        steps = steps_of(game(rules=rules, environment=breakout))
        # Random play loses a life of five in some 50 steps.
        assert len(steps) > 120
        assert [step.ended for step in steps] == [False] * (len(steps) - 1) + [True]

    def test_with_all_actions_has_eighteen(self):
        everything = dataclasses.replace(PONG, full_action_space=True)
        rules = dataclasses.replace(SHORT, epsilon=1.0)
        actions = {step.action for step in steps_of(game(rules=rules, environment=everything))}
        assert max(actions) > 5

    def test_ends_when_it_is_cancelled(self):
        with pytest.raises(CancelledError):
            play(game(), lambda _: 0, cancelled=lambda: True)


@pytest.fixture
def recorded() -> bytes:
    """ALE's action codes of 100 steps of random play in Pong, without no-ops."""
    codes = starts.action_codes('pong', full_action_space=False)
    rules = dataclasses.replace(SHORT, epsilon=1.0, max_noops=0)
    return bytes(codes[step.action] for step in steps_of(game(rules=rules)))


class TestStartPoints:
    def test_lead_to_the_recorded_state(self, recorded):
        rules = dataclasses.replace(SHORT, epsilon=1.0, max_noops=0)
        there = steps_of(game(rules=rules))[50].observation
        human = dataclasses.replace(PROTOCOLS['human'], max_frames=40)
        played = steps_of(game(rules=human, start=Start(recorded[:50])))
        np.testing.assert_array_equal(played[0].observation, there)

    def test_begin_score_and_frames(self, recorded):
        human = dataclasses.replace(PROTOCOLS['human'], max_frames=40)
        score = play(game(rules=human, start=Start(recorded[:50]), start_index=3), lambda _: 0)
        assert (score.frames, score.start_index, score.cut) == (40, 3, True)

    def test_with_actions_that_the_policy_lacks_fail(self):
        with pytest.raises(ValueError, match="outside the policy's action set"):
            play(game(rules=PROTOCOLS['human'], start=Start(b'\x05')), lambda _: 0)

    def test_are_read_as_they_were_written(self, recorded, tmp_path):
        path = tmp_path / 'starts.json'
        rng = np.random.default_rng(0)
        file = StartFile('pong', 4, 'random', starts.drawn([recorded], 10, rng))
        starts.write(path, file)
        assert starts.read(path, 'Pong', 4) == file
        assert len({start.actions for start in file.starts}) == 10

    def test_of_another_game_or_damaged_are_one_line(self, recorded, tmp_path):
        path = tmp_path / 'starts.json'
        starts.write(path, StartFile('pong', 4, 'random', (Start(recorded),)))
        with pytest.raises(UsageError, match='start points of pong, not of breakout'):
            starts.read(path, 'breakout', 4)
        with pytest.raises(UsageError, match='recorded with action repeat 4'):
            starts.read(path, 'pong', 3)
        path.write_text(path.read_text().replace('"pong"', '"qong"'))
        with pytest.raises(UsageError, match='damaged'):
            starts.read(path, 'pong', 4)
        with pytest.raises(UsageError, match='cannot be read'):
            starts.read(tmp_path / 'none.json', 'pong', 4)

    def test_are_not_drawn_from_too_little_play(self):
        with pytest.raises(UsageError, match='only 3 steps were played'):
            starts.drawn([b'\x00\x01\x02'], 4, np.random.default_rng(0))


def test_scores_are_combined_in_any_order():
    records = [Score(0, i, 1, None, float(i), 10, False) for i in range(4)]
    records.append(Failure(0, 4, 'lost'))  # type: ignore[arg-type]
    combined = results.combined(reversed(records))
    assert combined == results.combined(records)
    # Of 0, 1, 2, 3: deviation sqrt(1.25), that of a sample sqrt(5 / 3).
    assert (combined['mean'], combined['median'], combined['failed']) == (1.5, 1.5, 1)
    assert combined['std'] == pytest.approx(1.25**0.5)
    assert combined['standard_error'] == pytest.approx((5 / 3) ** 0.5 / 2)


class TestThreads:
    def test_score_as_one_does(self):
        chance = of_chance('pong', full_action_space=False)
        rules = dataclasses.replace(SHORT, epsilon=1.0)
        games = [game(episode, rules) for episode in range(6)]
        one, three = (
            results.by_policy(local.play_all([chance], games, threads, 60.0)) for threads in (1, 3)
        )
        assert one == three
        assert one[0]['episodes'] == 6

    def test_report_a_policy_that_cannot_be_opened(self):
        broken = Policy('nowhere', PONG, saved_model=b'no archive')
        (failure,) = local.play_all([broken], [game()], 1, 60.0)
        assert isinstance(failure, Failure)
        assert 'cannot be loaded' in failure.reason

    def test_end_with_the_iterator(self):
        chance = of_chance('pong', full_action_space=False)
        rules = dataclasses.replace(PROTOCOLS['noop'], epsilon=1.0)
        records = local.play_all([chance], [game(episode, rules) for episode in range(50)], 2, 60.0)
        next(records)
        records.close()  # type: ignore[attr-defined]  # returns within a step, not after 50 games


OF = 'tests.support.environments'


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """Two policies; the environment of the first hangs in its second step."""
    monkeypatch.setenv('NOTES_OF_ENVIRONMENTS', str(tmp_path / 'notes'))
    return [of_chance(f'{OF}:{name}', full_action_space=False) for name in ('hanging', 'counter')]


class TestHungGames:
    _RULES = dataclasses.replace(PROTOCOLS['plain'], max_frames=4, epsilon=1.0)

    def _game(self, policies, index):
        return Game(index, 0, 7, policies[index].environment, self._RULES)

    @pytest.mark.parametrize('name', ['hanging', 'hanging_reset', 'hanging_opening'])
    def test_fail_with_the_place_where_they_stand(self, hanging, name):
        policy = of_chance(f'{OF}:{name}', full_action_space=False)
        (failure,) = local.play_all([policy], [self._game([policy], 0)], 1, 0.5)
        reason = r'HungError: no step for 0\.5 s .*, at .*support/environments\.py:\d+'
        assert isinstance(failure, Failure)
        assert re.fullmatch(reason, failure.reason)

    def test_are_those_of_a_policy_that_does_not_open_too(self):
        # A run's policy opens its environment, to see its observations.
        config = presets.experiment('laptop', {'game': f'{OF}:hanging_opening'})
        policy = Policy(
            'run', config.environment, experiment=config, parameters=np.zeros(1, np.float32)
        )
        (failure,) = local.play_all([policy], [self._game([policy], 0)], 1, 0.5)
        assert isinstance(failure, Failure)
        assert failure.reason.startswith('HungError: no step for 0.5 s')

    def test_leave_the_others_to_be_played_but_for_those_of_their_policy(self, hanging):
        games = [self._game(hanging, index) for index in (0, 0, 0, 0, 1)]
        *failures, score = local.play_all(hanging, games, 1, 0.5)
        assert isinstance(score, Score)
        reasons = [failure.reason for failure in failures if isinstance(failure, Failure)]
        assert [reason.split(',')[0] for reason in reasons] == [
            *['HungError: no step for 0.5 s (--hang_seconds)'] * 3,
            'HungError: not played',
        ]

    def test_count_over_all_threads(self, hanging):
        failures = list(local.play_all(hanging, [self._game(hanging, 0)] * 8, 2, 0.5))
        reasons = [failure.reason for failure in failures if isinstance(failure, Failure)]
        hung = [reason for reason in reasons if 'no step for' in reason]
        assert len(reasons) == 8
        assert len(hung) in (3, 4)  # the other thread may have begun a fourth before the third hung

    @pytest.mark.parametrize('fails', [False, True])
    def test_are_not_in_a_row_with_another_end_between(self, hanging, fails):
        game = self._game(hanging, 1)
        if fails:
            unknown = dataclasses.replace(game.environment, game='nosuch')
            game = dataclasses.replace(game, environment=unknown)
        hung = Counter({1: 2})
        record = Players(hanging.__getitem__, 0.5, hung).played(game)
        assert isinstance(record, Failure) == fails
        assert hung[1] == 0

    def test_do_not_keep_an_evaluation_that_is_interrupted(self, hanging):
        games = [self._game(hanging, index) for index in (0, 1)]
        records = local.play_all(hanging, games, 2, 600.0)
        assert isinstance(next(records), Score)
        began = time.monotonic()
        records.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 60.0  # not 600

    def test_fail_on_an_engine_too(self, hanging, tmp_path):
        shared = Shared(str(tmp_path))
        for index, policy in enumerate(hanging):
            pathlib.Path(shared.policy(index)).write_bytes(policies.packed(policy))
        games = [self._game(hanging, index) for index in (0, 1)]
        with TestPipeline(runner=FnApiRunner()) as pipeline:
            _ = pipeline | Evaluate(games, shared, 0.5) | beam.ParDo(Write(shared))
        failed, played = (read_json(shared.scores(index)) for index in (0, 1))
        assert 'HungError: no step for 0.5 s' in failed['failures'][0]['reason']
        assert played['episodes'] == 1


class TestWorkWithinABound:
    def test_may_take_long_if_it_goes_on(self):
        def work(asked):
            for _ in range(6):  # 3 s
                time.sleep(0.5)
                assert not asked()
            return 'done'

        assert within(2.0, work) == 'done'

    def test_that_hung_ends_at_its_next_question(self):
        go_on, answers = threading.Event(), queue.SimpleQueue[bool]()

        def work(asked):
            go_on.wait(60.0)
            answers.put(asked())

        with pytest.raises(HungError, match=r'at .*test_evaluation\.py:'):  # not threading.py
            within(0.5, work)
        go_on.set()
        assert answers.get(timeout=60.0)

    def test_that_ends_its_interpreter_is_an_error(self):
        def work(_) -> None:
            sys.exit(3)

        with pytest.raises(RuntimeError, match=r'raised SystemExit\(3\)'):
            within(60.0, work)

    def test_is_let_go_with_its_error(self):
        class Held:
            pass

        def work(asked):
            held = Held()
            references.append(weakref.ref(held))
            raise ValueError

        references: list[weakref.ref[Held]] = []
        with contextlib.suppress(ValueError):
            within(60.0, work)
        assert references[0]() is None


def test_start_points_of_another_rom_are_refused(tmp_path, monkeypatch):
    path = tmp_path / 'starts.json'
    starts.write(path, StartFile('pong', 4, 'person', (Start(b'\x00'),)))
    monkeypatch.setattr(starts, '_rom_md5', lambda _: 'of another revision')
    with pytest.raises(UsageError, match='start points of pong'):
        starts.read(path, 'pong', 4)


def test_on_an_engine_a_game_that_fails_is_told_and_the_others_stand(tmp_path):
    rules = dataclasses.replace(PROTOCOLS['human'], epsilon=1.0, max_frames=40)
    # FIRE alone is in Pong's minimal set, DOWN (5) is not.
    points = [Start(b'\x00' * 8), Start(b'\x05'), Start(b'\x01' * 3)]
    games = [game(i, rules, start=point, start_index=i) for i, point in enumerate(points)]
    chance = of_chance('pong', full_action_space=False)
    shared = Shared(str(tmp_path))
    pathlib.Path(shared.policy(0)).write_bytes(policies.packed(chance))
    write_json(shared.starts(0), [point.actions.hex() for point in points])
    with TestPipeline(runner=FnApiRunner()) as pipeline:
        scores = pipeline | Evaluate(games, shared, 60.0)
        _ = scores | beam.ParDo(Write(shared))
    written = json.loads((tmp_path / 'scores-0.json').read_text())
    assert written == results.by_policy(local.play_all([chance], games, 1, 60.0))[0]
    assert (written['episodes'], written['failed']) == (2, 1)
    assert written['failures'][0]['episode'] == 1
    assert "outside the policy's action set" in written['failures'][0]['reason']
    records = [results.decoded(read_json(str(file))) for file in tmp_path.glob('played-*')]
    assert results.by_policy(records)[0] == written  # as after a failed job


def test_processes_are_found_beside_one_whose_name_is_no_text():
    rename = 'import ctypes, time; ctypes.CDLL(None).prctl(15, b"a\\xd0"); print(1, flush=True)'
    command = [sys.executable, '-c', f'{rename}; time.sleep(60)']
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in descendants(os.getpid())
        process.kill()


def test_the_progress_of_a_second_job_counts_the_games_of_the_first(tmp_path, monkeypatch, capsys):
    def is_shown() -> bool:
        shown.append(capsys.readouterr().err)
        return 'of 3' in ''.join(shown)

    def play_none(*_):  # the job's progress is shown by another thread
        assert eventually(is_shown)

    shown: list[str] = []
    shared = Shared(str(tmp_path))
    for episode in range(2):
        record = Failure(0, episode, 'as one of any score')
        write_json(shared.played(0, episode), results.encoded(record))
    monkeypatch.setattr(results, 'PROGRESS_SECONDS', 0.01)
    monkeypatch.setattr(beam_job, 'run', play_none)
    engine = catalog.engine('DirectRunner')
    options = PipelineOptions(engine.job_flags('evaluation', 1, []))
    evaluation_job._Job('DirectRunner', engine, options, 60.0).play([game(2)], shared)
    assert 'evaluate.py: 2 of 3 episodes\n' in ''.join(shown)


def test_a_signal_that_a_finalizer_loses_is_raised_again():
    def lose() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Ended:
            lost.append(time.monotonic())

    lost: list[float] = []
    cleaned: list[bool] = []
    with pytest.raises(Ended), handled(raise_ended):
        lose()
        try:
            time.sleep(10.0)
        finally:
            time.sleep(1.3)  # longer than until it would be raised a third time
            cleaned.append(True)
    assert lost
    assert cleaned
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def test_a_signal_ends_the_workers_of_this_machine_for_which_beam_waits(monkeypatch):
    with subprocess.Popen('sleep 60 & wait', shell=True) as shell:
        assert eventually(lambda: len(descendants(shell.pid)) == 1)
        workers = [shell.pid, *descendants(shell.pid)]
        monkeypatch.setattr(evaluation_job, 'descendants', lambda _: workers)
        with pytest.raises(Ended), evaluation_job._ending_workers():
            os.kill(os.getpid(), signal.SIGTERM)
        assert shell.wait(10) == -signal.SIGTERM
        assert eventually(lambda: has_ended(workers[1]))


@pytest.mark.parametrize('outside', [True, False])
def test_a_signal_that_an_import_delays_ends_the_workers_too(monkeypatch, outside):
    imports = [True, False]  # at the signal, and at the next look
    monkeypatch.setattr(interrupts, '_is_import', lambda _: imports.pop(0) if imports else False)
    with subprocess.Popen(['sleep', '60']) as worker:
        monkeypatch.setattr(evaluation_job, 'descendants', lambda _: [worker.pid])
        with pytest.raises(Ended), handled(raise_ended):
            if outside:
                os.kill(os.getpid(), signal.SIGTERM)
            with evaluation_job._ending_workers():
                if not outside:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10.0)
        assert worker.wait(10) == -signal.SIGTERM


def test_a_delayed_signal_is_not_lost_when_an_inner_block_ends(monkeypatch):
    imports = [True, False]
    monkeypatch.setattr(interrupts, '_is_import', lambda _: imports.pop(0) if imports else False)
    with pytest.raises(Ended), handled(raise_ended):
        with handled(raise_ended):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10.0)


def test_a_generator_that_a_signal_closes_cleans_up_undisturbed():
    def playing():
        try:
            yield 1
        finally:
            time.sleep(1.5)  # longer than until the signal would be raised again
            cleaned.append(True)

    cleaned: list[bool] = []
    with pytest.raises(Ended), handled(raise_ended):
        for _ in playing():
            os.kill(os.getpid(), signal.SIGTERM)
    assert cleaned


def test_an_alarm_of_somebody_else_is_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Ended), handled(raise_ended):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_job_that_failed_after_its_last_game_plays_none_again(tmp_path, monkeypatch):
    shared, notes = Shared(str(tmp_path)), []
    write_json(shared.played(0, 0), results.encoded(Failure(0, 0, 'as one of any score')))
    monkeypatch.setattr(evaluation_job._Job, 'play', lambda *_: pytest.fail('played again'))
    engine = catalog.engine('DirectRunner')
    job = evaluation_job._Job('DirectRunner', engine, PipelineOptions([]), 60.0)
    error = evaluation_job.JobFailedError('the combination failed')
    (record,) = evaluation_job._rescued(job, [game(0)], shared, error, notes.append)
    assert (record.episode, notes) == (0, [])


def test_a_second_ctrl_c_says_so_and_ends_the_process_at_once():
    code = """
import os, signal, time
from pipelines.launch.interrupts import handled, raise_ended
with handled(raise_ended):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
"""
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, 'SIGINT again: stopped at once\n')


def test_a_signal_ends_a_job_whose_end_fails_too():
    with pytest.raises(Ended), evaluation_job._logged('FlinkRunner'):
        try:
            raise Ended
        finally:
            raise ConnectionError('the job cannot be cancelled')


def test_the_environment_of_workers_is_not_kept(monkeypatch):
    monkeypatch.delenv('PYTHONSAFEPATH', raising=False)
    monkeypatch.setenv('PYTHONPATH', 'mine')
    before = dict(os.environ)
    with evaluation_job._environment_of_children():
        assert os.environ['PYTHONSAFEPATH'] == '1'
        assert os.environ['PYTHONPATH'].endswith('mine')
    assert dict(os.environ) == before


def test_workers_that_cannot_start_are_one_line_below_the_end_of_their_log(capfd):
    with pytest.raises(UsageError, match='the job failed .no worker process could start.. Fix: '):
        with evaluation_job._logged('DirectRunner'):
            os.write(2, b'ModuleNotFoundError: of a worker\n')
            evaluation_job._raise_no_workers()
    assert capfd.readouterr().err == 'ModuleNotFoundError: of a worker\n'


@pytest.mark.parametrize('kind', ['run', 'saved_model', 'random'])
def test_a_policy_is_the_same_after_its_way_to_a_worker(kind):
    policy = Policy('a', dataclasses.replace(PONG, frame_stack=3))
    if kind == 'run':
        parameters = np.arange(5, dtype=np.float32)
        experiment = presets.experiment('laptop', {})
        policy = Policy('a', PONG, experiment, parameters, checkpoint='checkpoint-1', updates=9)
    if kind == 'saved_model':
        policy = dataclasses.replace(policy, saved_model=b'archive', updates=3)
    there = policies.unpacked(policies.packed(policy))
    assert there.kind == kind
    assert np.array_equal(there.parameters, policy.parameters)  # type: ignore[arg-type]
    assert dataclasses.replace(there, parameters=policy.parameters) == policy
