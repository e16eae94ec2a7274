"""A replay shard in a process of its own, for tests and benchmarks."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.process import LAUNCHER_VARIABLE
from infra.replay.server import ShardConfig
from tests.support.waiting import pause

START_SECONDS = 90.0
_TICKS = os.sysconf('SC_CLK_TCK')


class ShardProcess:
    """Starts `python -m infra.replay.server`; `wait` returns once it serves."""

    def __init__(
        self, config: ShardConfig, directory: Path, shard: int = 0, own_state: bool = False
    ):
        """Files go to `directory`; with `own_state` the shard keeps its state there by itself."""
        self.directory = directory
        self.own_state = own_state
        self.shard = shard
        self.port = 0
        self._ready = directory / f'ready-{shard}.json'
        self._config = directory / f'replay-{shard}.json'
        self._config.write_text(json.dumps(dataclasses.asdict(config)))
        self.process: subprocess.Popen = self._start()

    @property
    def address(self) -> str:
        """host:port."""
        return f'localhost:{self.port}'

    def wait(self) -> 'ShardProcess':
        """Until it serves.

        Raises:
          RuntimeError: it ended, or does not serve after 90 s.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f'the shard does not serve (exit code {self.process.poll()})')
            time.sleep(0.05)
        self.port = json.loads(self._ready.read_text())['port']
        return self

    def kill(self) -> None:
        """Ends it without warning."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def pause(self) -> None:
        """Makes it hang until `resume`."""
        pause(self.process.pid)

    def resume(self) -> None:
        """Ends a `pause`."""
        self.process.send_signal(signal.SIGCONT)

    def restart(self, *options: str) -> 'ShardProcess':
        """Starts it again on its port; returns at once."""
        self._ready.unlink(missing_ok=True)
        self.process = self._start(*options)
        return self

    def close(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal; the exit code."""
        self.resume()
        self.process.send_signal(number)
        return self.process.wait(10)

    def __enter__(self) -> 'ShardProcess':
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.close()

    def cpu_seconds(self) -> float:
        """CPU time so far, to the clock tick of 10 ms."""
        fields = Path(f'/proc/{self.process.pid}/stat').read_text().rsplit(')', 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_bytes(self) -> int:
        """Resident memory."""
        for line in Path(f'/proc/{self.process.pid}/status').read_text().splitlines():
            if line.startswith('VmRSS'):
                return int(line.split()[1]) * 1024
        raise RuntimeError('no VmRSS')

    def _start(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, '-m', 'infra.replay.server', '--config', str(self._config)]
        command += ['--shard', str(self.shard), '--port', str(self.port)]
        command += ['--ready_file', str(self._ready)]
        place = '--state_dir' if self.own_state else '--checkpoint_dir'
        command += [place, str(self.directory / f'checkpoints-{self.shard}'), *options]
        with (self.directory / f'shard-{self.shard}.log').open('a') as log:
            # No shard outlives the tests, and none reaches itself by a proxy.
            environment = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid())}
            environment['http_proxy'] = 'http://127.0.0.1:9'  # which nothing listens on
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)
