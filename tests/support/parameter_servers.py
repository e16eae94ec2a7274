"""Parameter servers for tests: real ones, in this process or in processes of their own."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time

from infra.parameter_server import channel, protocol
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.server import ParameterServer
from infra.process import LAUNCHER_VARIABLE

LAYOUT = Layout(('kernel', 'bias'), ((3, 5), (4,)))
TIMEOUT_SECONDS = 10.0
_START_SECONDS = 90.0


def config(**changes):
    """AdaGrad with an accumulator so large that a gradient of g moves parameters by -g."""
    # learning_rate / sqrt(accumulator) = 1e6 / sqrt(1e12) = 1, to within float32 rounding.
    base = {
        'optimizer': 'adagrad', 'learning_rate': 1e6, 'adagrad_initial_accumulator': 1e12,
        'num_parameter_shards': 2, 'max_staleness': 3, 'target_update_period': 4,
    }  # fmt: skip
    return ParameterServerConfig(**{**base, **changes})


@contextlib.contextmanager
def serve(server_config):
    """All shards in this process."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(ParameterServer(server_config, shard))
            for shard in range(server_config.num_parameter_shards)
        ]


def connect(addresses, layout=LAYOUT, **options):
    """A client with a short time limit."""
    return ParameterClient(addresses, layout, **{'timeout_seconds': TIMEOUT_SECONDS, **options})


def ask(client, operation, body=None, shard=0, **fields):
    """Sends one message that the client itself would not send; returns the reply's header."""
    header = {'sequence': 1, 'agent_steps': 0, 'seen_updates': 0, 'seen_agent_steps': 0, **fields}
    connection = client.connections[shard]
    connection.connect(time.monotonic() + TIMEOUT_SECONDS)
    connection.send({'operation': operation, **header}, body)
    reply, _ = connection.receive(None)
    if 'error' in reply:
        raise protocol.ERRORS[reply['error']](reply['message'])
    return reply


@contextlib.contextmanager
def stranger(address):
    """A stream to a shard on which nothing was sent yet."""
    with contextlib.closing(channel.connect(address, time.monotonic() + TIMEOUT_SECONDS)) as stream:
        yield stream


class ShardProcess:
    """`python -m infra.parameter_server.server`, which can be killed and started again."""

    def __init__(self, directory, server_config, shard, *arguments, port=0):
        self._ready_file = directory / f'ready-{shard}'
        self._log_file = directory / f'log-{shard}'
        config_file = directory / 'config.json'
        config_file.write_text(json.dumps(dataclasses.asdict(server_config)))
        self._command = [
            sys.executable, '-m', 'infra.parameter_server.server', f'--config={config_file}',
            f'--shard={shard}', f'--ready_file={self._ready_file}',
        ]  # fmt: skip
        self.port = port
        self.start(*arguments)

    def start(self, *arguments):
        self._arguments = arguments
        self._ready_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [*self._command, f'--port={self.port}', *arguments],
            stderr=self._log_file.open('w'),
            env={
                **os.environ,
                'TF_CPP_MIN_LOG_LEVEL': '3',
                LAUNCHER_VARIABLE: str(os.getpid()),  # no shard outlives the tests
            },
        )

    def wait_ready(self):
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready_file.exists():
            assert time.monotonic() < deadline, 'the shard did not start in time'
            time.sleep(0.05)
            if self.process.poll() is not None:
                # A connection of any process may have the old port for a moment; supervisors retry.
                assert 'cannot listen' in self._log_file.read_text(), self._log_file.read_text()
                self.start(*self._arguments)
        ready = json.loads(self._ready_file.read_text())
        assert ready['pid'] == self.process.pid
        self.port = ready['port']
        return self

    @property
    def address(self):
        return f'127.0.0.1:{self.port}'

    def wait_failed(self):
        """Returns (exit code, standard error) of a shard that does not start."""
        code = self.process.wait(_START_SECONDS)
        return code, self._log_file.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait(TIMEOUT_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()
