"""Train and evaluate many runs: `python pipelines/suite.py --games pong,breakout --seeds 1..3`.

Each run is a process of run.py with a directory of its own. The same command, or `--resume
--suite_dir DIR`, continues a suite that was stopped or killed.
"""

import argparse
import contextlib
import pathlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports would print a traceback
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.flags import Parser, integer, nonempty, nonempty_path
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors
from pipelines.launch.interrupts import StartUp
from pipelines.suites.standing import END_SECONDS

# Beam takes a second to import, which --help and a first signal need not wait for.
if TYPE_CHECKING:
    from pipelines.suites.directory import SuiteDirectory
    from pipelines.suites.plan import Prepared, Run
    from pipelines.suites.scheduler import Entry, Scheduler

_POLL_SECONDS = 1.0
_PARENT = pathlib.Path('runs')
_AUTO = 'auto'
_SEEDS = '1'

_EPILOG = """examples:
  python pipelines/suite.py --games pong,breakout,freeway --seeds 1..3 --max_frames 1e6
  python pipelines/suite.py --games atari5 --grid learning_rate=1e-4,3e-4 --parallel auto
  python pipelines/suite.py --resume --suite_dir runs/suite-20261128-120000

Any other flag is one of run.py and holds for all runs, such as --runner or --max_frames; see
`python pipelines/run.py --help`.
"""


class Interruptions:
    """Counts the signals that ask for the end, once a run may have started.

    Attributes:
      start_up: ends the suite at a signal before that.
      first: number of the first, None before it.
    """

    def __init__(self) -> None:
        self.start_up = StartUp('suite.py', self.note)
        self.first: int | None = None
        self._pending = 0

    def note(self, number: int, _frame: object) -> None:
        """The handler."""
        if number == signal.SIGHUP and self.first is not None:
            return  # a closing terminal sends it more than once
        self.first = self.first or number
        self._pending += 1

    def take(self) -> bool:
        """Whether one has arrived that was not taken yet; takes it."""
        taken = self._pending > 0
        self._pending -= taken
        return taken


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line into the suite's flags and those of run.py."""
    parser = Parser(
        prog='suite.py',
        usage='suite.py --games GAME,... [flags] [flags of run.py]',
        description='Train and evaluate games x presets x grid x seeds, one run after another or'
        ' several at once, and report on them.',
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_plan(parser)
    _add_conduct(parser)
    return parser.parse_known_args(argv)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--games', metavar='GAME,...', help='Games, or the groups atari49 and atari5.'
    )
    parser.add_argument('--list_games', action='store_true', help='List the games and exit.')
    parser.add_argument(
        '--seeds',
        type=nonempty,
        help=f'Such as 1..3 or 1,2,5. Default: {_SEEDS}. Use 3 or more to compare.',
    )
    parser.add_argument(
        '--presets', type=nonempty, metavar='NAME,...', help='Presets. Default: laptop for Atari.'
    )
    parser.add_argument(
        '--grid',
        action='append',
        default=[],
        metavar='NAME=V1,V2',
        help='Values of a setting, one run for each; repeat it for all combinations.',
    )


def _parallel(text: str) -> int | str:
    """Parses --parallel, for argparse.

    Raises:
      ArgumentTypeError: it is neither `auto` nor a number from 1.
    """
    if text == _AUTO:
        return text
    with contextlib.suppress(argparse.ArgumentTypeError):
        if (number := integer(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is neither {_AUTO} nor a number from 1')


def _add_conduct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--parallel',
        type=_parallel,
        default=1,
        help='Runs at once, or auto: as many as cores and memory allow. Default: 1. Raise it if'
        ' cores are idle.',
    )
    parser.add_argument(
        '--suite_dir',
        type=nonempty_path,
        help='Directory of the suite, one run directory below it for each run. Default: that of an'
        ' unfinished suite of the same command in runs/, else runs/suite-<time>.',
    )
    parser.add_argument(
        '--resume', action='store_true', help='Continue the suite in --suite_dir by its own plan.'
    )


def asked(arguments: argparse.Namespace, flags: Sequence[str]) -> list['Run']:
    """The runs that the command line asks for, none with --resume alone.

    Raises:
      UsageError: a flag is missing, malformed or contradictory.
    """
    from pipelines.experiment.games import games_of
    from pipelines.suites import plan

    common = plan.joined(flags)
    given = [arguments.seeds, arguments.presets, *arguments.grid, *common]
    if arguments.games is None:
        if not arguments.resume:
            raise UsageError('--games: missing. Fix: name games, atari49 or atari5 (--list_games).')
        if any(given):
            raise UsageError('--resume: follows the plan of the suite. Fix: omit the other flags.')
        if arguments.suite_dir is None:
            raise UsageError('--resume: no suite given. Fix: name its directory in --suite_dir.')
        return []
    sweep = plan.Sweep(
        games_of(arguments.games),
        plan.presets_of(arguments.presets) if arguments.presets else (),
        plan.seeds_of(arguments.seeds or _SEEDS),
        plan.grid_of(arguments.grid),
        common,
    )
    return plan.expand(sweep)


def place(suite_dir: str | None, runs: Sequence['Run']) -> pathlib.Path:
    """Directory of the suite: the one given, that of an unfinished one of this plan, or a new one.

    Raises:
      UsageError: `suite_dir` is remote or unsuitable.
    """
    from pipelines.suites import directory

    if suite_dir is not None:
        return directory.local(suite_dir)
    found = directory.unfinished(_PARENT, runs)
    if found is not None:
        print(f'{found}: continues; for a new suite name another --suite_dir', flush=True)
    return (found or directory.new(_PARENT)).absolute()


def planned(
    path: pathlib.Path, runs: Sequence['Run'], arguments: argparse.Namespace
) -> list['Run']:
    """The runs of the suite in `path`, those that the command adds included.

    Raises:
      UsageError: the command contradicts the suite, or there is none to resume.
    """
    from pipelines.suites import directory, plan

    stored = directory.stored(path)
    if stored is None:
        if arguments.resume:
            raise UsageError(f'{path}: holds no suite. Fix: check --suite_dir, or omit --resume.')
        return list(runs)
    if not runs:
        return stored
    if flags := plan.differing(stored, runs):
        raise UsageError(
            f'{path}: holds a suite with other {", ".join(flags)}. Fix: continue it by --resume'
            ' --suite_dir alone, or choose another --suite_dir.'
        )
    return plan.extended(stored, runs)


def at_once(parallel: int | str, runs: Sequence['Prepared']) -> int:
    """The number of runs at once, for --parallel and the runs that are left."""
    from pipelines.suites.room import most_at_once

    return most_at_once(runs) if isinstance(parallel, str) else min(parallel, len(runs))


def conduct(
    directory: 'SuiteDirectory',
    runs: Sequence['Run'],
    parallel: int,
    command: str,
    signals: Interruptions,
) -> list['Entry']:
    """Writes the plan and runs it to its end or until a signal; returns its entries.

    Raises:
      UsageError: the plan cannot be written.
    """
    from pipelines.monitoring.display import open_display
    from pipelines.suites.report import Report
    from pipelines.suites.scheduler import DONE, Scheduler
    from pipelines.suites.table import Table

    table = Table()
    scheduler = Scheduler(directory, runs, parallel, print)
    directory.write(runs, command)
    print(f'suite directory: {directory.path}; runs: {len(runs)}, at once: {parallel}', flush=True)
    signals.start_up.launched = True
    with (
        open_display(render=table.render) as display,
        scheduler,
        Report(directory.report, directory.report_log, display.message) as report,
    ):
        scheduler.notify = display.message
        while scheduler.active or (report.active and not scheduler.stopping):
            if signals.take():
                _stop(scheduler, display.message)
            scheduler.poll()
            report.request([entry.path for entry in scheduler.of(DONE)])
            report.poll()
            table.update(display, scheduler.entries, parallel)
            time.sleep(_POLL_SECONDS)
        table.update(display, scheduler.entries, parallel)
    return scheduler.entries


def _stop(scheduler: 'Scheduler', notify: Callable[[str], None]) -> None:
    """Passes a signal on to the runs."""
    again = scheduler.stopping
    active = len(scheduler.of('running'))
    scheduler.interrupt()
    runs = f'{active} run{"s" * (active != 1)}'
    if again:
        notify(f'stopping {runs} at once, without a checkpoint')
    elif active:
        notify(f'stopping {runs} after a last checkpoint; once more stops at once')


def outcome(
    entries: Sequence['Entry'], path: pathlib.Path, parallel: int | str, number: int | None
) -> int:
    """Prints the result of a suite that has ended, by a signal or not; returns the exit code."""
    from pipelines.suites import scheduler, table

    for line in [*map(table.line, entries), *table.rules(entries)]:
        print(line)
    flags = [
        '--resume',
        '--suite_dir',
        str(path),
        *(['--parallel', str(parallel)] * (parallel != 1)),
    ]
    resume = f'`python pipelines/suite.py {shlex.join(flags)}`'
    failed = [entry for entry in entries if entry.state == scheduler.FAILED]
    done = sum(entry.state == scheduler.DONE for entry in entries)
    for entry in failed:
        print(f'suite.py: {entry.run.name}: {entry.reason}. Log: {entry.log}', file=sys.stderr)
    are = 'run is' if len(entries) == 1 else 'runs are'
    print(f'{done} of {len(entries)} {are} done, {len(failed)} failed: {path}')
    if number is not None and done < len(entries):
        print(f'{signal.Signals(number).name}: stopped. Resume with {resume}')
        return 128 + number
    if failed:
        print(f'suite.py: mend the cause, then try them again with {resume}', file=sys.stderr)
        return 1
    return 0


@one_line_errors('suite.py')
def main(argv: Sequence[str]) -> int:
    """Plans, runs and reports on a suite; returns the exit code."""
    exit_with_launcher(END_SECONDS)  # if the process that started it is gone
    signals = Interruptions()
    with signals.start_up:
        arguments, flags = parse(argv)
        if arguments.list_games:
            from pipelines.experiment.games import listing

            print(listing(shutil.get_terminal_size().columns))
            return 0
        from pipelines.suites import plan, room
        from pipelines.suites.directory import SuiteDirectory, is_done

        runs = asked(arguments, flags)
        path = place(arguments.suite_dir, runs)
        prepared = plan.prepare(planned(path, runs, arguments))
        runs = [each.run for each in prepared]
        left = [each for each in prepared if not is_done(path / each.run.name, each.run)]
        parallel = at_once(arguments.parallel, left or prepared)
        for warning in room.require_room(left, parallel, path) if left else ():
            print(f'suite.py: {warning}', file=sys.stderr)
        with SuiteDirectory.open(path) as directory:
            signals.start_up.directory = directory
            directory.require_own(runs)
            command = shlex.join(['suite.py', *argv])
            entries = conduct(directory, runs, parallel, command, signals)
        return outcome(entries, path, arguments.parallel, signals.first)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
