"""Exports, then evaluates the newest parameters of a run, in one separate process.

The launcher (pipelines/run.py) starts it as `python -m pipelines.finish RUN_DIR EVALUATION`. One
process for both, since each would import TensorFlow and build the agent.
"""

import sys
import traceback
from collections.abc import Sequence

from infra.output import protect_output
from pipelines import evaluate, export
from pipelines.errors import Main


def main(argv: Sequence[str]) -> int:
    """Runs export.py and evaluate.py; the second also if the first fails."""
    run_dir, output = argv
    exported = _code_of(export.main, f'--run_dir={run_dir}')
    return _code_of(evaluate.main, f'--run_dir={run_dir}', f'--output={output}') or exported


def _code_of(command: Main, *argv: str) -> int:
    try:
        return command(argv)
    except Exception:  # of any kind: an agent may be the user's own
        traceback.print_exc()
        return 1


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
