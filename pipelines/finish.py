"""The end of a run, in a process of its own: its newest parameters exported, then evaluated.

The launcher (pipelines/run.py) starts it as `python -m pipelines.finish RUN_DIR EVALUATION`. One
process for both, since each would import TensorFlow and build the agent.
"""

import sys
from collections.abc import Sequence

from infra.output import protect_output
from pipelines import evaluate, export


def main(argv: Sequence[str]) -> int:
    """Runs export.py and evaluate.py; the second also if the first fails."""
    run_dir, output = argv
    codes = (
        export.main([f'--run_dir={run_dir}']),
        evaluate.main([f'--run_dir={run_dir}', f'--output={output}']),
    )
    return max(codes)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
