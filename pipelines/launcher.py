"""One run from servers to summary: starts the boxes, watches them, checkpoints, evaluates.

    cluster (replay, parameter server) <- actors' job, learners' job -> telemetry -> monitor

In: an experiment and a run directory. Out: the directory's files and an exit code. No data of the
training passes through here, only statistics.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from infra.cluster import Cluster, ClusterError
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import (
    LayoutMismatchError,
    ParameterServerError,
    RequestRefusedError,
)
from infra.process import ProcessSpec, SupervisedProcess
from infra.replay.status import StatusReader
from infra.telemetry import TelemetryReader
from infra.tls import read_roots
from pipelines import agent
from pipelines.checkpoints import Checkpoints
from pipelines.config import ExperimentConfig
from pipelines.display import Display, open_display
from pipelines.errors import UsageError
from pipelines.evaluate import EVALUATION_FILE, PROGRESS_FILE
from pipelines.files import read_json
from pipelines.jobs import Jobs, WorkersFailedError
from pipelines.mirror import Mirror
from pipelines.monitor import Monitor, MonitorConfig
from pipelines.options import Launch
from pipelines.remote_run import RemoteRun
from pipelines.run_directory import RunDirectory
from pipelines.servers import cluster_config
from pipelines.training import LastCheckpointError, Replay, Training
from pipelines.workers import SERVER_SECONDS, Addresses

_POLL_SECONDS = 0.5
_FINISH_SECONDS = 1_800.0
_FAILED_EXIT_CODE = 1
_FAILURES = (
    ClusterError,
    WorkersFailedError,
    ParameterServerError,
    LastCheckpointError,
    OSError,
)


class Signals:
    """Notes the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.received: int | None = None

    def __enter__(self) -> 'Signals':
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            self._display.abandon()
            os._exit(128 + number)  # the children see their parent gone and end too
        self.received = number

    @property
    def name(self) -> str:
        """Name of the signal received."""
        return signal.Signals(self.received).name if self.received else ''


@dataclasses.dataclass
class Launcher:
    """What a run's phases share.

    Attributes:
      config: the experiment.
      launch: how it was asked for.
      directory: the run's, locked by this process.
      display: where progress is shown.
      signals: whether the user wants it to stop.
    """

    config: ExperimentConfig
    launch: Launch
    directory: RunDirectory
    display: Display
    signals: Signals

    def run(self) -> int:
        """Trains, evaluates and writes the summary; returns the exit code."""
        ours = not self.launch.replay_addresses
        checkpoints = Checkpoints(self.directory, self.config, replay_is_ours=ours)
        resumed = checkpoints.open(self.launch.resume, self.display.message)
        with Monitor(self.directory, self._monitor_config(), resumed) as monitor:
            if resumed is not None:
                self.display.update(monitor.state())
            try:
                reason = self._train(checkpoints, monitor, resumed)
            except _FAILURES as error:
                reason = f'failed: {error}'
                self.display.message(f'run.py: {error}')
            monitor.end_training()
            if self.signals.received and resumed is None and not monitor.state().agent_steps:
                self.display.message('stopped before the first frame: nothing is kept')
                self.directory.discard()
                return 128 + self.signals.received
            evaluation = self._evaluate() if reason == 'max_frames' else None
            if self.signals.received:
                reason = self.signals.name
            try:
                monitor.write_summary(reason, evaluation)
            except OSError as error:
                self.display.message(f'run.py: no summary: {error}')
                evaluation = None
            self._tell_result(evaluation)
        return self._exit_code(evaluation)

    def _tell_result(self, evaluation: Mapping[str, Any] | None) -> None:
        """The last line: what came of the run, and where it lies."""
        result = 'no evaluation'
        if evaluation is not None:
            result = (
                f'mean return {evaluation["mean"]:.1f} (standard deviation'
                f' {evaluation["std"]:.1f}) over {evaluation["episodes"]} games'
            )
        self.display.message(
            f'{self.config.environment.game}: {result}; summary.json, policy/ and the rest are in'
            f' {self.directory.path}'
        )

    def _exit_code(self, evaluation: Mapping[str, Any] | None) -> int:
        if self.signals.received:
            return 128 + self.signals.received
        return _FAILED_EXIT_CODE if evaluation is None else 0

    def _monitor_config(self) -> MonitorConfig:
        return MonitorConfig(
            game=self.config.environment.game,
            preset=self.config.preset,
            seed=self.config.run.seed,
            max_frames=self.config.run.max_frames,
            action_repeat=self.config.environment.action_repeat,
        )

    def _train(
        self, checkpoints: Checkpoints, monitor: Monitor, resumed: Mapping[str, Any] | None
    ) -> str:
        """Runs servers and jobs until the budget, a signal or a failure; returns the reason."""
        self.display.phase('starting servers')
        with self._training(checkpoints, monitor, resumed) as training:
            return training.run()

    @contextlib.contextmanager
    def _training(
        self, checkpoints: Checkpoints, monitor: Monitor, resumed: Mapping[str, Any] | None
    ) -> Iterator[Training]:
        """Servers that serve, and everything that watches them; closed in the reverse order."""
        with contextlib.ExitStack() as stack:
            servers = cluster_config(self.config, self.launch, self.directory.path)
            cluster = stack.enter_context(Cluster(servers, checkpoints.restore))
            addresses = self._addresses(cluster)
            layout = agent.layout_of(agent.build_policy(self.config))
            client = stack.enter_context(
                ParameterClient(
                    addresses.parameters,
                    layout,
                    timeout_seconds=SERVER_SECONDS,
                    tls_roots=addresses.tls_roots,
                )
            )
            owner = str(self.directory.path)
            _take(client, owner)
            reader = stack.enter_context(TelemetryReader(addresses.telemetry))
            first_submission = (resumed or {}).get('submissions', 0)
            jobs = Jobs(self.config, self.launch, addresses, self.directory, first_submission)
            stack.callback(jobs.stop)
            replay = Replay(addresses.replay, StatusReader(addresses.replay))
            yield Training(
                self.config,
                self.display,
                owner,
                lambda: self.signals.name,
                cluster,
                client,
                reader,
                jobs,
                monitor,
                checkpoints,
                replay,
            )

    def _addresses(self, cluster: Cluster) -> Addresses:
        roots = self.launch.tls_roots
        return Addresses(
            cluster.parameter_addresses,
            cluster.replay_addresses,
            cluster.telemetry_address,
            read_roots(roots) if roots else None,
        )

    def _evaluate(self) -> dict[str, Any] | None:
        """Evaluates and exports the last checkpoint, side by side, in processes of their own."""
        children = [self._child(verb) for verb in ('evaluate', 'export')]
        deadline = time.monotonic() + _FINISH_SECONDS
        episodes = self.config.run.evaluation_episodes
        try:
            for child in children:
                child.start()
            while any(child.poll() is None for child in children):
                if self.signals.received:
                    return None
                if time.monotonic() > deadline:
                    self.display.message(f'no evaluation within {_FINISH_SECONDS:g} s: given up')
                    return None
                done = (read_json(self.directory.path / PROGRESS_FILE) or {}).get('episodes', 0)
                self.display.phase(f'evaluating {done}/{episodes}')
                time.sleep(_POLL_SECONDS)
        finally:
            for child in children:
                child.terminate()
        failed = [child for child in children if child.poll() != 0]
        for child in failed:
            self.display.message(child.describe_failure())
        result = read_json(self.directory.path / EVALUATION_FILE)
        if failed or result is None:
            return None
        return {name: result[name] for name in ('protocol', 'episodes', 'epsilon', 'mean', 'std')}

    def _child(self, verb: str) -> SupervisedProcess:
        return SupervisedProcess(
            ProcessSpec(
                name=verb,
                argv=[
                    sys.executable,
                    '-m',
                    f'pipelines.{verb}',
                    f'--run_dir={self.directory.path}',
                ],
                log_file=self.directory.logs / f'{verb}.log',
                environment={
                    'TF_CPP_MIN_LOG_LEVEL': '2',
                    'TF_NUM_INTRAOP_THREADS': '1',
                    'CUDA_VISIBLE_DEVICES': '-1',  # an accelerator is the learners'
                },
                unset=('PYTHONDONTWRITEBYTECODE',),
            )
        )


def _take(client: ParameterClient, run: str) -> None:
    """Takes the shards for this run.

    Raises:
      UsageError: they hold the parameters of another network, or belong to another run.
    """
    try:
        client.claim(run)
    except (LayoutMismatchError, RequestRefusedError) as error:
        raise UsageError(str(error)) from error


def _mirrored(launcher: Launcher, remote: RemoteRun) -> int:
    """`Launcher.run`, its directory copied to a remote place meanwhile and at its end."""
    with Mirror(remote, launcher.directory, launcher.display.message) as mirror:
        code = launcher.run()
        launcher.display.phase(f'copying to {remote.url}')
    local = launcher.directory.path
    if mirror.problem:
        launcher.display.message(
            f'run.py: {remote.url} lacks a part of the run: {mirror.problem}; all of it is in'
            f' {local}, and `python pipelines/mirror.py --run_dir {local}` sends it'
        )
        return _FAILED_EXIT_CODE
    if not launcher.directory.unwanted(None):
        launcher.display.message(f'{remote.url} has all of it')
    return code


def launch(
    config: ExperimentConfig,
    launch_: Launch,
    directory: RunDirectory,
    remote: RemoteRun | None = None,
) -> int:
    """Runs the experiment in `directory`, a working copy of `remote`; returns the exit code.

    Raises:
      UsageError: a resumed run has no checkpoint that can be read.
    """
    # force: modules of Beam log while they are imported, and logging then has a handler already.
    log_file = pathlib.Path(directory.logs) / 'launcher.log'
    logging.basicConfig(filename=log_file, level=logging.INFO, force=True)
    with contextlib.suppress(RuntimeError):  # looked at already
        tf.config.set_visible_devices([], 'GPU')  # the learners'
    logging.raiseExceptions = False  # a full disk is told by who writes results, not by the log
    with open_display() as display, Signals(display) as signals:
        launcher = Launcher(config, launch_, directory, display, signals)
        return launcher.run() if remote is None else _mirrored(launcher, remote)
