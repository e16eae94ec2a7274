"""Exports and evaluates the newest policy of a run and films it, in one separate process.

The launcher (pipelines/run.py) starts it as `python -m pipelines.finish RUN_DIR EVALUATION
HANG_SECONDS` while the workers end, and releases it once they and the servers have ended. One
process for all, since each would import TensorFlow and build the agent. If evaluations during
training have found a best policy, this evaluation is compared with it, and the policy of the higher
mean exported.
"""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Sequence

from infra.output import protect_output
from infra.process import await_release, exit_with_launcher
from pipelines import evaluate, export
from pipelines.errors import Main, one_line_errors
from pipelines.launch.interrupts import stoppable
from pipelines.storage.evaluations import read_result
from pipelines.storage.run_directory import BEST, RunDirectory
from pipelines.storage.snapshots import keep_checkpoint_if_best

_SIGNALLED = 128  # exit codes above it: 128 + the signal


def main(argv: Sequence[str]) -> int:
    """Exports, evaluates and films, each also if another fails; the video is not in the code.

    Waits for its release first; returns 0 if the launcher ends without it.
    """
    run_dir, output, hang_seconds = argv
    exit_with_launcher()
    _import_all()
    if not await_release():
        return 0
    run = f'--run_dir={run_dir}'
    commands: list[tuple[Main, list[str]]] = [
        (export.main, [run]),
        (evaluate.main, [run, f'--output={output}', f'--hang_seconds={hang_seconds}']),
    ]
    if pathlib.Path(run_dir, BEST).is_dir():
        commands += [(compare, [run_dir, output]), (export.main, [run, '--checkpoint=best'])]
    worst = 0
    for command, arguments in commands:
        if (code := _code_of(command, arguments)) >= _SIGNALLED:
            return code
        worst = max(worst, code)
    _code_of(film, [run_dir, hang_seconds])
    return worst


def _import_all() -> None:
    """Imports what takes seconds; an error is left to the command that needs it."""
    with contextlib.suppress(Exception):
        import tensorflow  # noqa: F401
        from tf_agents.policies import policy_saver  # noqa: F401


@one_line_errors('best/', OSError)
def compare(argv: Sequence[str]) -> int:
    """Keeps what has been evaluated as the best, if it is (run directory, result); returns 0."""
    run_dir, output = argv
    directory = RunDirectory.existing(run_dir)
    if (result := read_result(pathlib.Path(output))) is not None:
        keep_checkpoint_if_best(directory, result)
    return 0


@one_line_errors('video.mp4', OSError)
@stoppable('video.mp4', 'No video is written.')
def film(argv: Sequence[str]) -> int:
    """Makes a run's video (run directory, --hang_seconds); returns the exit code."""
    from pipelines.evaluation import video  # imports FFmpeg

    run_dir, hang_seconds = argv
    video.record_run(run_dir, float(hang_seconds), _notify)
    return 0


def _notify(text: str) -> None:
    print(f'video.mp4: {text}', file=sys.stderr, flush=True)


def _code_of(command: Main, argv: Sequence[str]) -> int:
    try:
        return command(argv)
    except Exception:  # of any kind: an agent may be the user's own
        traceback.print_exc()
        return 1


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
