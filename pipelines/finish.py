"""Exports and evaluates the newest parameters of a run and films it, in one separate process.

The launcher (pipelines/run.py) starts it as `python -m pipelines.finish RUN_DIR EVALUATION`. One
process for all, since each would import TensorFlow and build the agent. Exports the best
parameters too, if evaluations during training have found some.
"""

import pathlib
import sys
import traceback
from collections.abc import Sequence

from infra.output import protect_output
from pipelines import evaluate, export
from pipelines.errors import Main
from pipelines.storage.run_directory import BEST


def main(argv: Sequence[str]) -> int:
    """Exports, evaluates and films, each also if another fails; the video is not in the code."""
    run_dir, output = argv
    run = f'--run_dir={run_dir}'
    codes = [_code_of(export.main, run)]
    if pathlib.Path(run_dir, BEST).is_dir():
        codes.append(_code_of(export.main, run, '--checkpoint=best'))
    codes.append(_code_of(evaluate.main, run, f'--output={output}'))
    _code_of(evaluate.film_run, run_dir)
    return max(filter(None, codes), default=0)


def _code_of(command: Main, *argv: str) -> int:
    try:
        return command(argv)
    except Exception:  # of any kind: an agent may be the user's own
        traceback.print_exc()
        return 1


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
