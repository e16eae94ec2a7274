"""Run directories in, a report out: an HTML page, and its tables and charts as files beside it."""

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from infra.disk import replaced_directory, write_atomically
from pipelines.errors import UsageError, unwritable
from pipelines.reporting import charts, curves, page, results, runs, tables
from pipelines.reporting.charts import Chart
from pipelines.reporting.results import Variant
from pipelines.storage.outputs import writable

VIDEO_MIB = 16.0
_TABLE_OF_A_REPORT = 'runs.csv'
_ANOTHER = 'name another file as --output'
_HEAD_BYTES = 2000  # of a page, which name its generator
_ACTIVITY = (
    (
        ('Throughput', 'Over the last minute; a line for each box in the charts of boxes.'),
        (
            ('rate/frames_per_second', 'emulator frames, or steps outside Atari', '1/s'),
            ('rate/updates_per_second', 'updates', 'updates/s'),
            ('rate/actor_{n}', 'actors', 'agent steps/s'),
            ('rate/learner_{n}', 'learners', 'gradients/s'),
            ('rate/parameter_server_{n}', 'parameter shards', 'pushes/s'),
            ('rate/replay_{n}', 'replay shards', 'inserts/s'),
        ),
    ),
    (
        ('Memory', 'Resident memory of each process.'),
        (
            ('memory_bytes/{box}', 'workers and servers', 'memory (bytes)'),
            ('memory_bytes/launcher', 'launcher', 'memory (bytes)'),
            ('memory_bytes/evaluator', 'evaluator', 'memory (bytes)'),
        ),
    ),
    (
        ('Games', 'Mean of the last 100 training games.'),
        (('episode/mean_length_100', 'length', 'agent steps'),),
    ),
    (
        (
            'Staleness',
            'Updates between the parameters that a gradient was computed from and its application.',
        ),
        (
            ('staleness/median', 'staleness, median', 'updates'),
            ('staleness/percentile_99', 'staleness, 99th percentile', 'updates'),
            ('staleness/learner_{n}/median', 'staleness of each learner, median', 'updates'),
            (
                'staleness/learner_{n}/percentile_99',
                'staleness of each learner, 99th percentile',
                'updates',
            ),
        ),
    ),
    (
        (
            'Rejections and replay',
            'Gradients that were not applied, since the start of the run; transitions sampled per'
            ' transition inserted.',
        ),
        (
            ('rejected/stale', 'rejected as stale', 'gradients'),
            ('rejected/outlier', 'dropped as outliers', 'gradients'),
            ('learner/outlier_share', 'outliers', 'share of gradients computed'),
            ('rejected/invalid', 'rejected as invalid', 'gradients'),
            ('replay/samples_per_insert', 'samples per insert', 'transitions / transition'),
        ),
    ),
)
_LEARNERS = 'Learners and actors', 'Means over ten seconds, as in TensorBoard.'


@dataclasses.dataclass(frozen=True)
class Written:
    """A report on disk.

    Attributes:
      page: the HTML file.
      files: the directory with its tables and charts.
      runs: number of runs in it.
      problems: what was skipped, and why.
    """

    page: pathlib.Path
    files: pathlib.Path
    runs: int
    problems: tuple[str, ...]


def write_report(
    run_dirs: Sequence[str],
    output: str | os.PathLike[str],
    video_mib: float = VIDEO_MIB,
    notify: Callable[[str], None] = lambda text: None,
) -> Written:
    """Writes the report of some runs; replaces an earlier report, nothing else.

    Args:
      run_dirs: run directories, local or at gs://, or local directories of such.
      output: the HTML file; `<name>_files` beside it takes tables and charts.
      video_mib: embedded videos have at most this size in all, MiB.
      notify: called with each step, and with what is skipped.

    Raises:
      UsageError: a directory holds no run, no run is readable, or `output` is not writable or is
        another file.
    """
    target, files = _targets(os.fspath(output))
    video_bytes = int(video_mib * 2**20)
    found, problems = _read(runs.find(run_dirs), video_bytes)
    for text in (*problems, f'runs read: {len(found)}; drawing'):
        notify(text)
    content = _content(results.variants(found), problems, files.name, video_bytes)
    html = page.render(content)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_directory(files) as staging:
            _write_files(content, staging)
            write_atomically(target, html)
    except OSError as error:
        raise unwritable(target, error, _ANOTHER) from error
    return Written(target, files, len(found), tuple(problems))


def _targets(output: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The page and the directory beside it, checked before the runs are read.

    Raises:
      UsageError: they cannot be written, or exist and are not of an earlier report.
    """
    target = writable(output)
    files = writable(f'{target.with_suffix("")}_files')
    try:
        replaceable = not target.exists() or _is_report(target)
    except OSError as error:
        raise unwritable(output, error, _ANOTHER) from error
    if not replaceable:
        raise UsageError(f'{output}: not a report. Fix: name a new file or a report as --output.')
    if files.exists() and not (files / _TABLE_OF_A_REPORT).is_file():
        raise UsageError(
            f'{files}: not the files of a report. Fix: move it, or name another --output.'
        )
    return target, files


def _is_report(path: pathlib.Path) -> bool:
    if not path.is_file():  # a directory, or a device that would be waited for
        return False
    with path.open('rb') as file:
        return page.GENERATOR.encode() in file.read(_HEAD_BYTES)


def _read(paths: Sequence[str], video_bytes: int) -> tuple[list[runs.Run], list[str]]:
    """The readable runs, and what was skipped.

    Raises:
      UsageError: none is readable; the message is that of the first.
    """
    found: list[runs.Run] = []
    problems: list[str] = []
    first: UsageError | None = None
    for path in paths:
        try:
            run = runs.read(path, video_bytes)
        except UsageError as error:
            first = first or error
            problems.append(f'skipped: {error}')
            continue
        found.append(run)
        problems += [f'{path}: {problem}' for problem in run.problems]
    if first is not None and not found:
        raise first
    return found, problems


def _content(
    variants: Sequence[Variant], problems: Sequence[str], files: str, video_bytes: int
) -> page.Content:
    verdicts = results.verdicts(variants)
    drawn = (
        charts.scores(verdicts, variants),
        charts.aggregates(verdicts, variants),
        charts.profiles(verdicts, variants),
    )
    return page.Content(
        variants=variants,
        verdicts=verdicts,
        scores=tuple(chart for chart in drawn if chart is not None),
        curves=_curves(variants),
        activity=_activity(variants),
        problems=problems,
        files=files,
        command=shlex.join(sys.argv),
        video_bytes=video_bytes,
    )


def _curves(variants: Sequence[Variant]) -> list[Chart]:
    """Over frames, and over core-minutes, or minutes where cores are unknown."""
    held = [run for variant in variants for run in variant.runs]
    known = all(curves.core_minutes(run) is not None for run in held if run.episodes)
    second = (
        charts.learning(variants, curves.core_minutes, 'core-minutes', 'core-minutes')
        if known
        else charts.learning(variants, curves.minutes, 'minutes', 'minutes')
    )
    drawn = [charts.learning(variants, curves.frames, 'frames', curves.unit(held)), second]
    return [chart for chart in drawn if chart is not None]


def _activity(variants: Sequence[Variant]) -> list[Chart]:
    drawn = [charts.scalars(*texts, variants, specs) for texts, specs in _ACTIVITY]
    drawn.append(charts.scalars(*_LEARNERS, variants, charts.learner_tags(variants)))
    if histogram := charts.staleness(variants):
        place = [chart.title for chart in drawn].index('Staleness')
        pictures = (histogram, *drawn[place].pictures)
        drawn[place] = dataclasses.replace(drawn[place], pictures=pictures)
    return [chart for chart in drawn if chart.pictures or 'Zero' in chart.caption]


def _write_files(content: page.Content, directory: pathlib.Path) -> None:
    for table in (
        tables.scores(content.verdicts),
        tables.aggregates(content.verdicts),
        tables.runs(content.variants),
        tables.settings(content.variants),
    ):
        (directory / f'{table.name}.csv').write_text(table.csv())
        (directory / f'{table.name}.json').write_text(table.json())
    drawn = [*content.scores, *content.curves, *content.activity]
    for picture in (picture for chart in drawn for picture in chart.pictures):
        (directory / f'{picture.name}.svg').write_bytes(picture.svg)
        (directory / f'{picture.name}.png').write_bytes(picture.png)
