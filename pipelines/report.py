"""Report: run directories in, one HTML page with their scores, curves and settings out.

python pipelines/report.py runs/my-run runs/another --output report.html
"""

import pathlib
import signal
import sys
from collections.abc import Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports would print a traceback
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.flags import Parser, nonempty_path, number_from_zero
from infra.output import protect_output
from pipelines.errors import one_line_errors
from pipelines.launch.interrupts import stoppable
from pipelines.reporting.report import VIDEO_MIB, write_report


def _parser() -> Parser:
    parser = Parser(
        prog='report.py',
        description='Write one HTML page about one run or many: scores beside the published ones,'
        ' aggregates with intervals, curves, videos, settings. It needs no network.',
        epilog='Runs that differ in game and seed only count as one variant, their seeds as'
        ' repetitions. Active runs and runs of earlier versions are welcome; damaged files are'
        ' skipped and named. Tables (CSV, JSON) and charts (SVG, PNG) are written beside the page,'
        ' to <output>_files.',
    )
    parser.add_argument(
        'runs',
        metavar='RUN',
        nargs='+',
        type=nonempty_path,
        help='Run directory, local or gs://..., or a local directory that holds run directories.',
    )
    parser.add_argument(
        '--output',
        type=nonempty_path,
        default='report.html',
        help='HTML file. An earlier report is replaced, another file is not. Default: report.html.',
    )
    parser.add_argument(
        '--video_mib',
        type=number_from_zero,
        default=VIDEO_MIB,
        help='MiB of videos that the page embeds at most; others are named. Lower it for a page to'
        f' send by mail; 0: none. Default: {VIDEO_MIB:g}.',
    )
    return parser


@one_line_errors('report.py', OSError)
@stoppable('report.py', 'No report is written.')
def main(argv: Sequence[str]) -> int:
    """Writes the report; returns the exit code."""
    arguments = _parser().parse_args(argv)
    written = write_report(arguments.runs, arguments.output, arguments.video_mib, _notify)
    skipped = f', problems: {len(written.problems)} (see above)' if written.problems else ''
    print(f'{written.page}: runs: {written.runs}{skipped}\ntables and charts: {written.files}')
    return 0


def _notify(text: str) -> None:
    print(f'report.py: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
