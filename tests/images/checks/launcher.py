"""Run inside the image `launcher`: a whole run in miniature, by the image's user."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

_FLAGS = (
    '--max_frames=6000', '--num_learners=2', '--min_replay_size=400', '--replay_capacity=20000',
    '--envs_per_actor=4', '--evaluation_episodes=1', '--evaluation_max_frames=400',
)  # fmt: skip


def main() -> None:
    assert os.getuid() != 0, 'the launcher needs no root'
    with tempfile.TemporaryDirectory() as directory:
        run = pathlib.Path(directory) / 'run'
        command = [sys.executable, '/opt/gorila/pipelines/run.py', f'--run_dir={run}', *_FLAGS]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=600)
        summary = json.loads((run / 'summary.json').read_text())
    assert summary['exit_reason'] == 'max_frames', summary
    assert summary['updates'] > 0, summary


if __name__ == '__main__':
    main()
