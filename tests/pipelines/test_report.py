"""Reports of runs that the project's own writers wrote, whole, active, old or damaged."""

import csv
import json
import resource
import shutil
import signal

import numpy as np
import pytest

from infra.disk import write_json
from pipelines import report
from pipelines.errors import UsageError
from pipelines.reporting import charts, curves, page, records, reference, results, runs, tables
from pipelines.reporting.report import write_report
from tests.support.reported_runs import evaluation, make_run, make_video

VIDEO_BYTES = 1 << 20


def read(path):
    return runs.read(str(path), VIDEO_BYTES)


def verdicts_of(*paths):
    return results.verdicts(results.variants([read(path) for path in paths]))


def rows_of(files, table):
    with (files / f'{table}.csv').open() as file:
        return list(csv.DictReader(file))


class TestRuns:
    def test_a_run_is_read_as_it_was_written(self, tmp_path):
        run = read(make_run(tmp_path / 'run', 'pong', seed=3, score=15.0))
        assert (run.game, run.seed, run.frames, run.state) == ('pong', 3, 8000, 'max_frames')
        assert [episode.raw_return for episode in run.episodes][:2] == [-21.0, -19.0]
        assert run.evaluations[0].mean == 15.0
        assert [row.mean for row in run.curve] == [-10.0, 5.0]
        assert run.scalar('progress/updates')[-1, 0] == 8000
        assert run.cores(run.sessions[0].start) == 2
        assert run.problems == ()

    def test_an_active_run_needs_no_summary(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=None)
        (path / 'summary.json').unlink()
        run = read(path)
        assert run.state == 'no summary: active or killed'
        assert run.frames == 8000  # from its scalars

    def test_runs_outside_atari_have_steps(self, tmp_path):
        path = make_run(tmp_path / 'cart', 'CartPole-v1', seed=1, score=None)
        (path / 'episodes.jsonl').unlink()
        shutil.rmtree(path / 'events')
        run = read(path)
        # 40 games of 50 steps, 30 s each: as the summary alone says.
        assert (run.frames, run.summary.frames_per_second) == (2_000, pytest.approx(50 / 30, 1e-3))
        atari = read(make_run(tmp_path / 'pong', 'pong', seed=1, score=None))
        assert curves.unit([run]) == 'steps'
        assert curves.unit([atari]) == 'emulator frames'
        assert curves.unit([run, atari]) == 'frames or steps'
        assert reference.title('MinAtar/Asterix-v1') == 'MinAtar/Asterix-v1'

    def test_results_of_earlier_versions_are_read(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=None)
        old = {'protocol': 'no-op starts', 'episodes': 30, 'epsilon': 0.05, 'mean': 4.0, 'std': 1.0}
        write_json(path / 'evaluation.json', {**old, 'updates': 9, 'returns': [4.0] * 30})
        (path / 'launches.jsonl').unlink()
        verdict = verdicts_of(path)[0]
        assert verdict.protocol.comparable
        assert verdict.scores[0].mean == 4.0
        assert curves.core_minutes(read(path)) is None  # cores unknown
        assert curves.minutes(read(path)) is not None

    def test_settings_that_an_earlier_version_lacked_have_its_values(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=None)
        held = json.loads((path / 'config.json').read_text())
        del held['seal'], held['checksum'], held['learner']['outlier_rule']
        (path / 'config.json').write_text(json.dumps(held))
        assert read(path).settings['outlier_rule'] == 'every'

    def test_settings_of_a_later_version_are_read_as_they_are(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=None)
        held = json.loads((path / 'config.json').read_text())
        del held['seal'], held['checksum'], held['learner']
        held['learners'] = {'of_tomorrow': 7}
        (path / 'config.json').write_text(json.dumps(held))
        assert read(path).settings['of_tomorrow'] == 7

    @pytest.mark.parametrize(
        'name',
        ['summary.json', 'evaluation.json', 'evaluations.jsonl', 'launches.jsonl', 'video.mp4'],
    )
    def test_a_damaged_file_is_skipped_and_named(self, tmp_path, name):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=1.0, games=1)
        (path / name).write_text('{"protocol": \n')
        (problem,) = read(path).problems
        assert problem.startswith(f'{name}: ')
        assert 'skipped (' in problem
        assert 'Fix: ' in problem

    def test_the_sound_lines_beside_a_damaged_one_count(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=1.0, games=1)
        for name in ('evaluations.jsonl', 'launches.jsonl'):
            text = (path / name).read_text()
            # No such record; a blank line; a last line that is being written.
            (path / name).write_text(f'{{"mean": 5}}\n{text}\n{{"cut')
        run = read(path)
        assert ([row.mean for row in run.curve], len(run.launches)) == ([-10.0, 5.0], 1)
        assert [problem.partition(': skipped')[0] for problem in run.problems] == [
            'evaluations.jsonl: 1 of 3 lines',
            'launches.jsonl: 1 of 2 lines',
        ]

    def test_a_film_that_is_cut_off_is_skipped_and_named(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=1.0, games=0)
        film = path / 'video.mp4'
        make_video(film, frames=5)
        whole = film.read_bytes()
        assert runs.read(str(path), len(whole)).video == runs.Video(len(whole), whole)
        assert runs.read(str(path), len(whole) - 1).video == runs.Video(len(whole), None)
        film.write_bytes(whole[:-1])
        run = read(path)
        assert run.video is None
        assert run.problems[0].startswith('video.mp4: skipped (no whole MP4 file). Fix: remove')

    def test_damaged_episodes_and_events_are_skipped_and_named(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=1.0)
        lines = (path / 'episodes.jsonl').read_text().splitlines()
        (path / 'episodes.jsonl').write_text('\n'.join(['{"episode', *lines[1:]]) + '\n{"cut')
        (path / 'events' / 'events.out.tfevents.1.host.1').write_bytes(b'no event file')
        run = read(path)
        assert len(run.episodes) == len(lines) - 1
        episodes, events = run.problems
        assert episodes.startswith(f'episodes.jsonl: 1 of {len(lines)} lines: skipped (damaged)')
        assert events.startswith('events/events.out.tfevents.1.host.1: skipped (')

    def test_a_directory_of_runs_counts_as_all_of_them(self, tmp_path):
        for seed in (1, 2):
            make_run(tmp_path / f'run-{seed}', 'pong', seed, 1.0)
        (tmp_path / 'notes').mkdir()
        assert runs.find([str(tmp_path)]) == [str(tmp_path / 'run-1'), str(tmp_path / 'run-2')]

    def test_a_run_named_twice_counts_once(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, 1.0)
        assert len(runs.find([str(path), f'{path}/', str(tmp_path)])) == 1

    def test_time_between_two_launches_is_not_training(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', seed=1, score=None, resumed_after_seconds=3600)
        run = read(path)
        spent = [session.end - session.start for session in run.sessions]
        assert len(spent) == 2
        assert tables.minutes(run) == pytest.approx(sum(spent) / 60)
        # Two cores, four after the resume.
        assert tables.core_minutes(run) == pytest.approx((2 * spent[0] + 4 * spent[1]) / 60)
        (path / 'launches.jsonl').unlink()  # of an earlier version
        assert tables.minutes(read(path)) == pytest.approx(sum(spent) / 60)

    def test_runs_that_share_a_machine_are_counted(self, tmp_path):
        first = make_run(tmp_path / '1', 'pong', 1, None, games=2)
        second = shutil.copytree(first, tmp_path / '2')
        assert tables.at_once([read(first)]) == 1
        assert tables.at_once([read(first), read(second)]) == 2
        assert 'shared by up to 2 of these runs at once' in _render(first, second)


class TestWrongValues:
    """Any JSON in a run's files makes a page: one odd run must not cost a suite its report."""

    @pytest.fixture(scope='class')
    def sound(self, tmp_path_factory):
        return make_run(tmp_path_factory.mktemp('sound') / 'run', 'pong', 1, 5.0, games=2)

    @pytest.fixture
    def run_dir(self, tmp_path, sound):
        return shutil.copytree(sound, tmp_path / 'run')

    @pytest.mark.parametrize(
        'value',
        ['y', 10**400, -1, [1], {'a': [None]}, None, True],
        ids=lambda value: str(value)[:9],
    )
    def test_no_value_of_a_file_prevents_the_page(self, run_dir, value):
        for name in ('summary.json', 'evaluation.json', 'launches.jsonl'):
            held = json.loads((run_dir / name).read_text())
            nested = {
                key: dict.fromkeys(entry, value) if isinstance(entry, dict) else entry
                for key, entry in held.items()
            }
            rows = [dict.fromkeys(held, value), nested, {}]
            lines = rows if name.endswith('.jsonl') else rows[1:2]
            (run_dir / name).write_text(''.join(json.dumps(row) + '\n' for row in lines))
            write_json(run_dir / f'evaluation-{name}.json', rows[0])
        _render(run_dir)
        write_json(run_dir / 'summary.json', dict.fromkeys(held, value))
        _render(run_dir)

    @pytest.mark.parametrize(
        'bins', [[1], 'x', {'0': 'x', '1': [2]}, {'0': 10**400}], ids=lambda bins: str(bins)[:9]
    )
    def test_a_damaged_histogram_of_staleness_is_left_out(self, run_dir, bins):
        write_json(run_dir / 'summary.json', {'staleness': {'histogram': bins}})
        assert charts.staleness(results.variants([read(run_dir)])) is None

    def test_a_result_with_damaged_rules_is_no_score(self, run_dir):
        write_json(run_dir / 'evaluation.json', evaluation(9.0, deviations={'max_frames': 'x'}))
        run = read(run_dir)
        assert run.evaluations == ()
        reason = 'skipped (deviation max_frames is invalid)'
        assert run.problems == (f'evaluation.json: {reason}. Fix: restore a copy of the file.',)

    def test_a_launch_without_command_is_shown_without(self, run_dir):
        time = '"time": "2026-11-28T12:00:00+00:00"'
        (run_dir / 'launches.jsonl').write_text(f'{{{time}, "git": "abc", "cores": "8"}}\n')
        assert '<pre>–</pre>' in _render(run_dir)

    @pytest.mark.parametrize(
        'value', ['x', 10**400, [1], {'a': 1}, None], ids=lambda value: str(value)[:9]
    )
    def test_no_setting_prevents_the_page(self, run_dir, value):
        held = json.loads((run_dir / 'config.json').read_text())
        groups = {
            key: dict.fromkeys(entry, value)
            for key, entry in held.items()
            if isinstance(entry, dict)
        }
        (run_dir / 'config.json').write_text(json.dumps(groups | {'preset': value}))
        old = {'protocol': 'no-op starts', 'episodes': 30, 'mean': 4.0}
        write_json(run_dir / 'evaluation.json', old)
        _render(run_dir)


def _render(*paths):
    """The page of runs, without charts; its tables are written too."""
    found = results.variants([read(path) for path in paths])
    verdicts = results.verdicts(found)
    for table in (tables.scores(verdicts), tables.runs(found), tables.settings(found)):
        assert table.csv()
        assert table.json()
    return page.render(page.Content(found, verdicts, (), (), (), (), 'f', 'c', 0))


class TestResults:
    def test_seeds_are_one_variant_and_settings_distinguish_variants(self, tmp_path):
        paths = [make_run(tmp_path / f'a{seed}', 'pong', seed, 1.0) for seed in (1, 2)]
        paths.append(make_run(tmp_path / 'b', 'pong', 1, 2.0, learning_rate=1e-4 * 3))
        paths.append(make_run(tmp_path / 'c', 'pong', 1, 2.0, preset='apex', games=0))
        variants = results.variants([read(path) for path in paths])
        assert [(v.key, v.name, len(v.runs)) for v in variants] == [
            ('A', 'laptop, learning_rate 0.0006', 2),
            ('B', 'laptop, learning_rate 0.0003', 1),  # 1e-4 * 3 == 0.00030000000000000003
            ('C', 'apex', 1),  # its other settings follow from the preset
        ]

    def test_wins_are_counted_against_the_published_scores(self, tmp_path):
        # With no-op starts DQN has 18.9 and Gorila 18.3 on Pong, 401.2 and 402.2 on Breakout.
        paths = [
            make_run(tmp_path / 'pong', 'pong', 1, 18.5),
            make_run(tmp_path / 'breakout', 'breakout', 1, 401.5),
        ]
        verdict = verdicts_of(*paths)[0]
        assert verdict.wins('gorila') == (1, 2)
        assert verdict.wins('dqn') == (1, 2)
        assert verdict.aggregates['median'].low is None  # single seeds

    def test_an_interval_needs_two_seeds_of_each_game(self, tmp_path):
        paths = [make_run(tmp_path / f'{s}', 'pong', s, 10.0 + s) for s in (1, 2, 3)]
        estimate = verdicts_of(*paths)[0].aggregates['mean']
        # Pong: random -20.7, human 9.3; the seeds' 11, 12 and 13 points are 105.7, 109 and 112.3 %.
        assert estimate.value == pytest.approx(109.0)
        assert estimate.low == pytest.approx(105.7, abs=0.1)
        assert estimate.high == pytest.approx(112.3, abs=0.1)

    def test_scores_under_other_rules_win_and_lose_nothing(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, None)
        write_json(path / 'evaluation.json', evaluation(20.0, protocol='rainbow'))
        verdict = verdicts_of(path)[0]
        assert not verdict.protocol.comparable
        assert verdict.scores[0].beats('gorila') is None
        assert verdict.wins('gorila') == (0, 0)

    @pytest.mark.parametrize('written', ['now', 'before'])
    def test_no_op_starts_cut_off_earlier_are_other_rules(self, tmp_path, written):
        path = make_run(tmp_path / 'run', 'pong', 1, None, evaluation_max_frames=2000)
        result = evaluation(20.0, max_frames=2000, deviations={'max_frames': 2000})
        if written == 'before':  # the run's settings say it
            result['protocol'] = 'no-op starts'
            del result['max_frames'], result['deviations']
        write_json(path / 'evaluation.json', result)
        verdict = verdicts_of(path)[0]
        assert verdict.protocol.name == 'no-op starts, max_frames 2000'
        assert not verdict.protocol.comparable

    def test_a_protocol_of_a_later_version_is_shown_but_not_compared(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, None)
        write_json(path / 'evaluation.json', {**evaluation(20.0), 'protocol': 'of-tomorrow'})
        assert not verdicts_of(path)[0].protocol.comparable

    def test_the_evaluation_with_most_games_counts_not_the_best(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, 5.0)
        write_json(path / 'evaluation-2.json', evaluation(1.0, episodes=40))
        chosen = results.chosen(read(path))
        assert [e.file for e in chosen.values()] == ['evaluation-2.json']

    def test_a_later_evaluation_of_newer_parameters_replaces_an_earlier_one(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, 5.0)
        write_json(path / 'evaluation-100.json', evaluation(1.0, episodes=100, updates=240))
        assert [e.mean for e in results.chosen(read(path)).values()] == [5.0]
        write_json(path / 'evaluation-2.json', evaluation(6.0, episodes=30, updates=960))
        assert [e.mean for e in results.chosen(read(path)).values()] == [6.0]

    @pytest.mark.parametrize(
        ('protocol', 'others', 'missed'),
        [
            ('noop', {'episodes': 29}, '30 games'),
            ('human', {'episodes': 99}, '100 games'),
            ('human', {'starts': {'file': 'a', 'count': 20}}, '100 start points'),
        ],
    )
    def test_fewer_games_than_the_protocols_are_a_named_deviation(self, protocol, others, missed):
        exact = results.protocol(records.evaluation('f', evaluation(5.0, protocol)), {})
        assert exact.comparable
        held = records.evaluation('f', evaluation(5.0, protocol, **others))
        rules = results.protocol(held, {})
        assert rules.name == f'{exact.name}, fewer than {missed}'
        assert not rules.comparable
        assert f'the published scores are of {missed}, so no win' in rules.note

    def test_start_points_of_an_unknown_player_are_named_by_their_file(self):
        held = evaluation(5.0, 'human', starts={'file': 'starts/pong.json', 'count': 100})
        assert records.evaluation('f', held).start_source == 'unknown (starts/pong.json)'

    def test_no_op_starts_come_before_human_ones(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, 5.0, games=2)
        human = evaluation(19.0, protocol='human', updates=960)
        write_json(path / 'evaluation-h.json', human)
        found = verdicts_of(path)
        assert [v.protocol.name for v in found] == ['no-op starts', 'human starts']
        text = _render(path)
        assert '<h1>Pong: 5.0 points, below Gorila’s 18.3</h1>' in text
        assert '<td>1</td><td>100</td><td>960</td>' in text
        assert 'Start points played by: person.' in text
        assert tables.runs([found[0].variant]).rows[0]['protocol'] == 'no-op starts'
        (path / 'evaluation.json').unlink()
        assert 'points, above Gorila’s 16.7 (human starts)</h1>' in _render(path)

    def test_each_series_of_a_chart_has_its_own_name_and_colour(self, tmp_path):
        paths = [make_run(tmp_path / 'a', 'pong', 1, 5.0, games=0)]
        paths.append(make_run(tmp_path / 'b', 'pong', 1, 5.0, games=0, learning_rate=1e-4))
        for path in paths:
            write_json(path / 'evaluation-h.json', evaluation(19.0, protocol='human'))
            write_json(path / 'evaluation-r.json', evaluation(19.0, protocol='rainbow'))
        variants = results.variants([read(path) for path in paths])
        verdicts = results.verdicts(variants)
        shown = charts.series(verdicts, variants, 'noop')
        assert [series.name for series in shown] == [
            'A',
            'B',
            'A, rainbow',
            'B, rainbow',
        ]
        assert [series.index for series in shown[:2]] == [0, 1]  # the variants' own colours
        human = charts.series(verdicts, variants, 'human', comparable=True)
        assert [series.name for series in human] == ['A', 'B']
        assert len({series.index for series in (*shown, *human)}) == 6

    @pytest.mark.parametrize(
        ('others', 'reason'),
        [
            ({'game': 'breakout'}, 'of another game (breakout)'),
            (
                {'policy': {'kind': 'saved_model', 'path': 'elsewhere/policy'}},
                'of a policy of another kind (saved_model, elsewhere/policy)',
            ),
            ({'policy': {'kind': 'random'}}, 'of a policy of another kind (random, no path)'),
        ],
    )
    def test_a_result_of_another_game_or_kind_is_no_score_of_the_run(
        self, tmp_path, others, reason
    ):
        path = make_run(tmp_path / 'run', 'pong', 1, 5.0)
        write_json(path / 'evaluation-x.json', evaluation(21.0, episodes=100, **others))
        run = read(path)
        assert [e.mean for e in run.evaluations] == [5.0]
        (problem,) = run.problems
        assert problem.startswith(f'evaluation-x.json: skipped ({reason}). Fix: move it')

    def test_the_best_checkpoint_has_a_row_of_its_own(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, 5.0)
        policy = {'kind': 'run', 'path': 'runs/run', 'checkpoint': 'best', 'updates': 240}
        best = evaluation(20.0, episodes=100, policy=policy)
        write_json(path / 'evaluation-best.json', best)
        found = verdicts_of(path)
        assert [(v.protocol.name, v.scores[0].mean) for v in found] == [
            ('no-op starts', 5.0),
            ('no-op starts, best checkpoint', 20.0),
        ]
        assert 'Pong: 5.0 points, below Gorila' in _render(path)
        row = tables.runs([found[0].variant]).rows[0]
        assert (row['score'], row['checkpoint']) == (5.0, 'checkpoint-1')

    def test_the_end_of_a_curve_is_the_evaluation_at_the_end(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, None)
        write_json(path / 'evaluation-x.json', evaluation(20.0))
        assert charts.final(read(path)) is None
        write_json(path / 'evaluation.json', evaluation(3.0))
        found = charts.final(read(path))
        assert found is not None
        assert found.mean == 3.0

    def test_settings_that_change_nothing_learned_make_no_variant(self, tmp_path):
        paths = [
            make_run(tmp_path / 'a', 'pong', 1, 1.0, games=2),
            make_run(tmp_path / 'b', 'pong', 2, 1.0, games=2, video=False, evaluator_episodes=9),
        ]
        assert len(results.variants([read(path) for path in paths])) == 1

    def test_a_game_outside_the_49_has_a_score_only(self, tmp_path):
        verdict = verdicts_of(make_run(tmp_path / 'run', 'solaris', 1, 5.0))[0]
        assert verdict.scores[0].published is None
        assert verdict.aggregates == {}


class TestCurves:
    def test_a_curve_starts_with_the_first_games(self, tmp_path):
        run = read(make_run(tmp_path / 'run', 'pong', 1, None))
        found = curves.curve([run], curves.frames)
        assert found is not None
        # Games end every 200 frames, scores rise by 2 each; within 4 % of 8,000 frames of 200 are
        # the games that ended at 200 and 400.
        first = np.flatnonzero(~np.isnan(found.mean))[0]
        assert found.x[first] < 400
        assert found.mean[first] == pytest.approx(-20.0, abs=1.0)

    def test_the_band_spans_the_seeds_up_to_where_the_first_ends(self, tmp_path):
        held = [read(make_run(tmp_path / f'{s}', 'pong', s, None, games=10 * s)) for s in (2, 4)]
        found = curves.curve(held, curves.frames)
        assert found is not None
        known = ~np.isnan(found.mean)
        assert (found.low[known] <= found.high[known]).all()
        assert found.x[known].max() <= 20 * 200  # frames of the shorter run


class TestReport:
    def test_page_tables_and_charts_are_written(self, whole_report):
        assert whole_report.runs == 8
        scores = rows_of(whole_report.files, 'scores')
        assert [(row['game'], row['seeds'], row['score'][:6]) for row in scores] == [
            ('breakout', '2', '345.0'),  # 300 x 1.1 and 300 x 1.2
            ('pong', '2', '19.55'),
            ('breakout', '2', '150.0'),
            ('pong', '2', '8.5'),
            ('pong', '2', '20.15'),  # rainbow: 20.1 and 20.2
        ]
        assert {(row['games'], row['fewest_games']) for row in scores} == {('60', '30')}
        listed = json.loads((whole_report.files / 'scores.json').read_text())
        assert [row['beats_gorila'] for row in listed] == [False, True, False, False, None]
        for name in ('scores-noop', 'profile', 'curve-frames-pong', 'curve-core-minutes-pong'):
            assert (whole_report.files / f'{name}.svg').read_text().startswith('<?xml')
            assert (whole_report.files / f'{name}.png').read_bytes().startswith(b'\x89PNG')
            assert 'var(--' not in (whole_report.files / f'{name}.svg').read_text()

    def test_the_page_says_what_the_published_scores_are(self, whole_report):
        text = whole_report.page.read_text()
        assert 'Gorila beat DQN on 31 of 49' in text  # no-op starts (docs/report.md)
        assert 'Published scores count as exact' in text

    @pytest.mark.parametrize(
        'name',
        [
            'rate-actors',
            'rate-learners',
            'memory_bytes-boxes',
            'memory_bytes-launcher',
            'episode-mean_length_100',
            'staleness-learners-median',
            'staleness-learners-percentile_99',
            'learner-outlier_share',
        ],
    )
    def test_a_figure_of_the_boxes_has_a_chart(self, whole_report, name):
        assert (whole_report.files / f'scalar-{name}.svg').exists()

    @pytest.fixture(scope='class')
    def odd(self, tmp_path_factory):
        """The report of a run with an odd name and a large video, beside unreadable ones."""
        root = tmp_path_factory.mktemp('odd')
        path = make_run(root / '<img src=x>&$x$', 'pong', 1, 1.0, games=1)
        make_video(path / 'video.mp4')
        bad = make_run(root / 'bad', 'pong', 2, None, games=0)
        lost = shutil.copytree(bad, root / 'lost')
        (bad / 'config.json').write_text('{')
        (lost / 'config.json').unlink()
        return write_report([str(root)], root / 'report.html', video_mib=1e-4)

    def test_names_cannot_inject_markup(self, odd):
        assert '<img' not in odd.page.read_text()
        assert '&lt;img src=x&gt;&amp;$x$' in odd.page.read_text()

    def test_a_single_seed_shows_no_interval(self, odd):
        assert {row['low'] for row in rows_of(odd.files, 'aggregates')} == {''}

    def test_the_video_is_of_the_best_run_under_one_protocol(self, tmp_path):
        paths = [make_run(tmp_path / f'{s}', 'pong', s, 10.0 + s, games=2) for s in (1, 2)]
        write_json(paths[0] / 'evaluation-r.json', evaluation(21.0, protocol='rainbow'))
        for path in paths:
            make_video(path / 'video.mp4', frames=1)
        assert f'<code>{paths[1]}/video.mp4' in _render(*paths)

    def test_a_large_video_is_named_not_embedded(self, odd):
        assert 'data:video/mp4' not in odd.page.read_text()
        assert 'Not embedded' in odd.page.read_text()

    def test_unreadable_runs_among_others_are_named_on_the_page(self, odd):
        assert odd.runs == 1
        assert 'bad: config.json is damaged' in odd.page.read_text()
        assert 'lost: holds no run (config.json is missing). Fix: name' in odd.page.read_text()

    def test_a_game_of_any_name_writes_into_the_reports_directory_only(self, tmp_path):
        path = make_run(tmp_path / 'run', 'pong', 1, None, games=1)
        config = (path / 'config.json').read_text().replace('"pong"', '"../../evil"')
        held = json.loads(config)
        del held['seal'], held['checksum']
        (path / 'config.json').write_text(json.dumps(held))
        written = write_report([str(path)], tmp_path / 'a b#c.html')
        assert (written.files / 'curve-frames-..-..-evil.svg').exists()
        assert not list(tmp_path.parent.glob('*evil*'))
        assert 'href="a%20b%23c_files/runs.csv"' in written.page.read_text()

    def test_a_later_report_replaces_an_earlier_one(self, tmp_path):
        first = make_run(tmp_path / 'first', 'pong', 1, None, games=1)
        second = make_run(tmp_path / 'second', 'breakout', 1, None, games=0)
        write_report([str(first)], tmp_path / 'report.html')
        written = write_report([str(second)], tmp_path / 'report.html')
        assert 'Breakout' in written.page.read_text()
        assert not (written.files / 'curve-frames-pong.svg').exists()

    def test_the_headline_of_a_run_without_evaluation_says_so(self, tmp_path):
        # Returns -21, -19, ..., 57: 18 in the mean.
        path = make_run(tmp_path / 'run', 'pong', 1, None)
        assert page.headline(None, _content(path)) == (
            'Pong: 18.0 points in the last 40 training games, not evaluated yet'
        )

    def test_a_run_without_games_or_scores_makes_a_page(self, tmp_path):
        # Only `config.json` and what a monitor writes at once.
        path = make_run(tmp_path / 'run', 'pong', 1, None, games=0)
        for name in ('evaluations.jsonl', 'launches.jsonl', 'summary.json'):
            (path / name).unlink()
        text = write_report([str(path)], tmp_path / 'report.html').page.read_text()
        assert page.headline(None, _content(path)) in text
        assert 'No run has an evaluation yet' in text


def _content(path):
    return page.Content(results.variants([read(path)]), [], (), (), (), (), '', '', 0)


class TestCommand:
    @pytest.fixture
    def run_dir(self, tmp_path):
        return make_run(tmp_path / 'run', 'pong', 1, None, games=0)

    def refused(self, capsys, *arguments):
        assert report.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith('report.py: ')
        assert error.count('\n') == 1
        assert 'Fix: ' in error
        return error

    def test_it_says_what_it_wrote(self, tmp_path, run_dir, capsys):
        assert report.main([str(run_dir), '--output', str(tmp_path / 'r.html')]) == 0
        assert f'{tmp_path}/r.html: runs: 1' in capsys.readouterr().out

    def test_a_missing_directory_is_refused(self, tmp_path, capsys):
        self.refused(capsys, tmp_path / 'nowhere', '--output', tmp_path / 'r.html')

    def test_an_empty_directory_is_refused(self, tmp_path, capsys):
        (tmp_path / 'empty').mkdir()
        assert 'holds no run' in self.refused(
            capsys, tmp_path / 'empty', '--output', tmp_path / 'r.html'
        )

    def test_a_damaged_run_alone_is_refused(self, tmp_path, run_dir, capsys):
        (run_dir / 'config.json').write_text('{')
        code = report.main([str(run_dir), '--output', str(tmp_path / 'r.html')])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1
        assert 'config.json is damaged' in lines[-1]
        assert not (tmp_path / 'r.html').exists()

    @pytest.fixture
    def unread(self, monkeypatch):
        """What is refused is refused before a run is read."""
        monkeypatch.setattr(runs, 'read', lambda *_: pytest.fail('a run is read'))

    @pytest.mark.parametrize(
        'name',
        [
            'directory',
            'notes.txt',
            'notes.txt/r.html',
            'gs://b/r.html',
            '/dev/stdin',
            '/proc/r.html',
            f'new/{"r" * 240}.html',  # too long beside its temporary name
        ],
    )
    def test_an_output_that_cannot_be_or_is_another_file_is_refused(
        self, tmp_path, run_dir, capsys, unread, name
    ):
        (tmp_path / 'directory').mkdir()
        (tmp_path / 'notes.txt').write_text('mine')
        output = name if ':' in name else tmp_path / name
        assert str(output) in self.refused(capsys, run_dir, '--output', output)
        assert (tmp_path / 'notes.txt').read_text() == 'mine'
        assert sorted(file.name for file in tmp_path.iterdir()) == ['directory', 'notes.txt', 'run']

    def test_a_disk_without_a_block_is_named_before_a_run_is_read(
        self, tmp_path, run_dir, capsys, unread
    ):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # each write fails
        try:
            line = self.refused(capsys, run_dir, '--output', tmp_path / 'new' / 'r.html')
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert line.startswith(f'report.py: {tmp_path}/new/r.html: cannot be written (File too')
        assert [path.name for path in tmp_path.iterdir()] == ['run']

    def test_directories_of_a_new_output_are_created_with_it(self, tmp_path, run_dir, capsys):
        (run_dir / 'config.json').write_text('{')
        arguments = [str(run_dir), '--output', str(tmp_path / 'a' / 'b' / 'r.html')]
        assert report.main(arguments) == 2
        assert not (tmp_path / 'a').exists()
        shutil.rmtree(run_dir)
        make_run(run_dir, 'pong', 1, None, games=0)
        assert report.main(arguments) == 0
        assert (tmp_path / 'a' / 'b' / 'r.html').exists()

    def test_files_that_are_not_of_a_report_stay(self, tmp_path, run_dir, capsys):
        (tmp_path / 'r_files').mkdir()
        (tmp_path / 'r_files' / 'mine.txt').touch()
        self.refused(capsys, run_dir, '--output', tmp_path / 'r.html')
        assert (tmp_path / 'r_files' / 'mine.txt').exists()
        assert not (tmp_path / 'r.html').exists()

    def test_a_full_disk_leaves_nothing(self, tmp_path, run_dir, capsys, monkeypatch):
        def full(path, _):
            raise OSError(28, 'No space left on device', f'{path}.temporary')

        monkeypatch.setattr('pipelines.reporting.report.write_atomically', full)
        assert report.main([str(run_dir), '--output', str(tmp_path / 'r.html')]) == 2
        error = capsys.readouterr().err
        assert f'{tmp_path}/r.html: cannot be written (No space left on device). Fix: ' in error
        assert [path.name for path in tmp_path.iterdir()] == ['run']

    @pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_leaves_nothing(self, tmp_path, run_dir, capsys, monkeypatch, number):
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        monkeypatch.setattr(
            'pipelines.reporting.report.write_atomically', lambda *_: signal.raise_signal(number)
        )
        code = report.main([str(run_dir), '--output', str(tmp_path / 'r.html')])
        assert code == 128 + number
        assert 'stopped. No report is written.' in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ['run']
        assert {n: signal.getsignal(n) for n in before} == before

    def test_a_damaged_file_is_named_on_the_terminal_and_on_the_page(
        self, tmp_path, run_dir, capsys
    ):
        (run_dir / 'evaluations.jsonl').write_text('damage\n')
        assert report.main([str(run_dir), '--output', str(tmp_path / 'r.html')]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith(f'{tmp_path}/r.html: runs: 1, problems: 1 (see above)')
        named = f'{run_dir}: evaluations.jsonl: 1 of 1 lines: skipped (damaged). Fix: restore'
        assert f'report.py: {named}' in printed.err
        assert named in (tmp_path / 'r.html').read_text()

    def test_a_video_limit_below_zero_is_refused(self, run_dir, capsys):
        with pytest.raises(SystemExit) as ended:
            report.main([str(run_dir), '--video_mib', '-1'])
        assert ended.value.code == 2

    def test_errors_are_the_users(self, tmp_path):
        with pytest.raises(UsageError):
            write_report([], tmp_path / 'r.html')
