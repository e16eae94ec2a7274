"""A run over three hosts (network namespaces) at several round-trip times; prints JSON.

    python -m tests.benchmarks.benchmark_hosts --round_trips_ms 0,1,10,50

Servers and launcher are on the first host, the actor on the second, the learners on the third; all
share this machine's processors, so what falls with the round trip is what waiting costs.
"""

import argparse
import json
import pathlib
import re
import shlex
import signal
import subprocess
import tempfile
import time

from tests.support import hosts

_LINE = re.compile(r'\[(\d+):(\d+):(\d+)\] training \| frames ([\d,]+)/.*\| updates ([\d,]+) ')
_START_SECONDS = 300.0
_STOP_SECONDS = 200.0
# Learning starts soon, and nothing is evaluated or exported: the run is stopped before.
_FLAGS = '--min_replay_size=2000 --no-checkpoint_replay'


def progress(output: pathlib.Path) -> list[tuple[int, int, int]]:
    """Seconds, frames and updates of each line that tells of training."""
    lines = _LINE.findall(output.read_text())
    return [
        (3600 * int(h) + 60 * int(m) + int(s), int(f.replace(',', '')), int(u.replace(',', '')))
        for h, m, s, f, u in lines
    ]


def wait_for_lines(process: subprocess.Popen, output: pathlib.Path, count: int) -> None:
    """Waits until the run has told of its training so often.

    Raises:
      RuntimeError: it ended, or does not train in time.
    """
    deadline = time.monotonic() + _START_SECONDS
    while len(progress(output)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f'the run does not train:\n{output.read_text()}')
        time.sleep(1.0)


def rates(round_trip_ms: float, loss: float, flags: list[str], seconds: float) -> dict[str, float]:
    """Frames and updates a second at one round-trip time."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        output = directory / 'run.out'
        with hosts.three_host_run(directory, flags, round_trip_ms, loss) as process:
            wait_for_lines(process, output, 2)  # the first one comes from the middle of the start
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            process.wait(_STOP_SECONDS)
        lines = progress(output)[1:]
        if len(lines) < 2:
            raise RuntimeError(f'{seconds:g} s are too short to see a rate:\n{output.read_text()}')
        (start, first_frames, first_updates), (end, frames, updates) = lines[0], lines[-1]
    return {
        'round_trip_ms': round_trip_ms,
        'seconds': end - start,
        'frames_per_second': (frames - first_frames) / (end - start),
        'updates_per_second': (updates - first_updates) / (end - start),
    }


def main() -> None:
    """Prints one measurement for each round-trip time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--round_trips_ms', default='0,1,10,50', help='separated by commas')
    parser.add_argument('--loss', type=float, default=0.0, help='probability of a segment')
    parser.add_argument('--seconds', type=float, default=45.0, help='how long to observe each')
    parser.add_argument('--flags', default=_FLAGS, help='flags of the run')
    arguments = parser.parse_args()
    flags = shlex.split(arguments.flags)
    results = [
        rates(float(text), arguments.loss, flags, arguments.seconds)
        for text in arguments.round_trips_ms.split(',')
    ]
    print(json.dumps({'flags': arguments.flags, 'loss': arguments.loss, 'runs': results}, indent=2))


if __name__ == '__main__':
    main()
