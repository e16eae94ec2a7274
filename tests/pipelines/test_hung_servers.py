"""Servers that hang, as real processes that are stopped: the watch goes on, workers live on."""

import contextlib
import dataclasses
import io
import threading
import time
import types
from collections.abc import Callable

import numpy as np
import pytest

from infra.cluster import Cluster, ClusterConfig
from infra.parameter_server.config import ParameterServerConfig
from infra.replay.config import ReplayConfig
from infra.replay.status import StatusReader
from infra.replay.trajectory import TrajectorySpec
from infra.telemetry import Telemetry, TelemetryReader
from pipelines.events import HEARTBEAT
from pipelines.launch import jobs as jobs_lib
from pipelines.launch import shard_watch
from pipelines.launch.evaluator import EvaluatorProcess
from pipelines.launch.saver import Saver
from pipelines.launch.shard_watch import Replay
from pipelines.launch.training import Training
from pipelines.monitoring.display import PlainDisplay
from pipelines.monitoring.monitor import Monitor
from pipelines.storage.checkpoints import Checkpoints
from tests.pipelines.test_jobs import ALL, Run
from tests.pipelines.test_training import MONITOR
from tests.support import parameter_servers
from tests.support.waiting import pause

_HUNG_SECONDS = 2.0
_SILENCE_SECONDS = 4.0  # a server takes longer to start again
_SECONDS = 100.0  # for both


@contextlib.contextmanager
def beating(run, address):
    """Every worker of the run tells the telemetry at `address` that it lives."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        workers = {
            each: stack.enter_context(Telemetry(address, *each[0], submission=each[1]))
            for each in ALL
        }

        def beat():
            while not stop.wait(0.3):
                for each, telemetry in workers.items():
                    telemetry.record(HEARTBEAT, pid=run.pid(*each))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        yield
        stop.set()
        thread.join()


@pytest.fixture
def cluster(tmp_path):
    """Gives a function that opens real servers which start from where `restore` says."""
    config = ClusterConfig(
        run_directory=tmp_path / 'run',
        parameter_server=ParameterServerConfig(num_parameter_shards=2),
        replay=ReplayConfig(num_replay_shards=1),
        trajectory=TrajectorySpec(),
    )
    return lambda restore: Cluster(config, restore)


@pytest.fixture
def training(tmp_path, cluster, monkeypatch):
    """A training of small workers with real servers, and the run of its jobs."""
    monkeypatch.setattr(shard_watch, 'HUNG_SECONDS', _HUNG_SECONDS)
    monkeypatch.setattr(shard_watch, 'ASK_SECONDS', 1.0)
    # Whoever tells and whoever listens share a channel here: they are back at once.
    monkeypatch.setattr(shard_watch, '_LONGEST_PAUSE_SECONDS', 3.0)
    monkeypatch.setattr(jobs_lib, 'SILENCE_SECONDS', _SILENCE_SECONDS)
    run = Run(tmp_path)
    run.directory.config_file.write_text('{}')
    checkpoints = Checkpoints(run.directory, run.config)
    display = PlainDisplay(told := io.StringIO())
    with contextlib.ExitStack() as stack:
        stack.callback(run.directory.close)
        servers = stack.enter_context(cluster(checkpoints.restore))
        connect = [
            stack.enter_context(
                parameter_servers.connect(servers.parameter_addresses, timeout_seconds=90.0)
            )
            for _ in range(2)
        ]
        connect[0].initialise(np.zeros(connect[0].layout.size, np.float32))
        stack.callback(run.jobs.stop)
        yield (
            Training(
                config=run.config,
                display=display,
                owner='run',
                signals=types.SimpleNamespace(name='', effect=''),  # type: ignore[arg-type]
                cluster=servers,
                client=connect[0],
                reader=stack.enter_context(TelemetryReader(servers.telemetry_address)),
                jobs=run.jobs,
                monitor=stack.enter_context(Monitor(run.directory, MONITOR)),
                saver=Saver(checkpoints, connect[1], display.message),
                replay=Replay(servers.replay_addresses, StatusReader(servers.replay_addresses)),
                evaluator=EvaluatorProcess(run.config, run.directory, 0.0, display.message),
                at_budget=lambda: None,
            ),
            run,
            told,
        )


@dataclasses.dataclass
class Interruption:
    """Stands in for the user's signals: asks `received` at each look."""

    received: Callable[[], str]
    effect: str = ''

    @property
    def name(self) -> str:
        return self.received()


def test_servers_that_hang_are_replaced_while_the_watch_goes_on_and_workers_live(training):
    watch, run, told = training
    looks: list[float] = []
    restarted: dict[str, float] = {}  # seconds from hanging, by component

    def story():
        """An event for each look."""
        watch.saver.save_parameters()  # to come back with
        while watch.saver.busy:
            yield ''
        for name in ('replay_0', 'parameter_server_1'):
            pause(watch.cluster.pids[name])
        watch.saver.save((), watch.monitor.counters())  # waits for one of them
        stopped = time.monotonic()
        while len(restarted) < 2:
            for component, count in watch.cluster.restarts.items():
                if count:
                    restarted.setdefault(component, time.monotonic() - stopped)
            yield ''
        while watch.saver.busy or not watch.reader.hears:
            yield ''
        heard = watch.hearing.seconds
        while watch.hearing.seconds < heard + _SILENCE_SECONDS + 1.0:
            yield ''

    events, deadline = story(), time.monotonic() + _SECONDS

    def interrupted():
        assert time.monotonic() < deadline, (restarted, told.getvalue())
        looks.append(time.monotonic())
        return next(events, 'done')

    watch.signals = Interruption(interrupted)
    with beating(run, watch.cluster.telemetry_address):
        assert watch.run() == 'done'
    text = told.getvalue()
    # The bound, a question every 2 s, a second for each of three answers, and the back-off.
    assert max(restarted.values()) < _HUNG_SECONDS + 2 * (2.0 + 3.0) + 3.0, (restarted, text)
    assert max(np.diff(looks)) < 6.0  # three such seconds, on a busy machine
    assert text.count('killed to restart it') == 2
    assert len(run.started) == 2, text  # nobody was submitted again
