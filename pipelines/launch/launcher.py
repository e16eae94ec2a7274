"""Runs an experiment: starts servers and workers, supervises them, checkpoints, has it evaluated.

    cluster (replay, parameter server) <- actors' job, learners' job -> telemetry -> monitor

In: an experiment and a run directory. Out: the directory's files and an exit code. Only statistics
pass through this process, no training data.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from infra.cluster import Cluster, ClusterConfig
from infra.cores import usable_cores
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import (
    LayoutMismatchError,
    RequestRefusedError,
)
from infra.replay.status import StatusReader
from infra.telemetry import TelemetryReader
from infra.tls import read_roots
from pipelines.errors import UsageError, reason_of, with_remedy
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses, Launch
from pipelines.launch.evaluator import EvaluatorProcess
from pipelines.launch.finishing import Finishing, Outcome
from pipelines.launch.interrupts import Signals
from pipelines.launch.jobs import Jobs
from pipelines.launch.saver import Saver
from pipelines.launch.server_settings import cluster_config
from pipelines.launch.shard_watch import Replay
from pipelines.launch.training import FAILURES, Training
from pipelines.monitoring.display import Display, open_display
from pipelines.monitoring.drawing import Drawing
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.monitoring.weights_and_biases import WandbWriter
from pipelines.storage import provenance
from pipelines.storage.checkpoints import Checkpoints
from pipelines.storage.evaluations import EVALUATION_FILE, rename_old
from pipelines.storage.resuming import resuming
from pipelines.storage.run_directory import RunDirectory, command
from pipelines.storage.space import temporary_files
from pipelines.workers.boxes import SERVER_SECONDS

if TYPE_CHECKING:
    from pipelines.storage.remote_run import RemoteRun

_FAILED_EXIT_CODE = 1
_AT_BUDGET = 'max_frames'  # the reason of a run that has trained all of them
_FAILED = 'failed'  # begins the reason of a run that failed


@dataclasses.dataclass
class Launcher:
    """State that a run's phases share.

    Attributes:
      config: the experiment.
      launch: how to launch it.
      directory: the run's, locked by this process.
      display: shows progress.
      signals: whether the user has requested the end.
      failures: number of failures of servers and workers; the logs give the reasons.
    """

    config: ExperimentConfig
    launch: Launch
    directory: RunDirectory
    display: Display
    signals: Signals
    failures: int = 0

    def __post_init__(self) -> None:
        self._finishing = Finishing(
            self.config, self.directory, self.display, self.signals, self.launch.jobs.hang_seconds
        )

    def run(self) -> int:
        """Trains, evaluates and writes the summary; returns the exit code."""
        ours = not self.launch.replay_addresses
        checkpoints = Checkpoints(self.directory, self.config, replay_is_ours=ours)
        notes: list[str] = []
        resumed = checkpoints.open(self.launch.resume, notes.append)
        with contextlib.closing(self._finishing), self._monitor(resumed) as monitor:
            if resumed is not None:
                self.display.update(monitor.state())  # sets the clock of the notes
            for note in notes:
                self.display.message(note)
            trained = (resumed or {}).get('agent_steps', 0) >= self.config.max_agent_steps
            # A run that was ended while it was evaluated has only its end left.
            reason = _AT_BUDGET if trained else self._train_or_fail(checkpoints, monitor, resumed)
            monitor.end_training()
            unused = resumed is None and not monitor.state().agent_steps
            if self.signals.received and unused and not self.failures:
                self.display.message('stopped before the first frame: nothing is kept')
                self.display.end(monitor.state())
                self.directory.discard()
                return 128 + self.signals.received
            at_budget = reason == _AT_BUDGET
            outcome = self._finishing.evaluate() if at_budget else Outcome()
            reason = exit_reason(reason, self.signals.name)
            summarised = self._write_summary(monitor, reason, outcome)
            self._finishing.tell_result(outcome, summarised)
            if not at_budget and (how := resuming(self.directory)):
                self.display.message(f'run.py: {how}')
        if self.signals.received:
            return 128 + self.signals.received
        whole = summarised and outcome.exported and outcome.evaluation is not None
        return 0 if whole else _FAILED_EXIT_CODE

    def _train_or_fail(
        self, checkpoints: Checkpoints, monitor: Monitor, resumed: Mapping[str, Any] | None
    ) -> str:
        """Trains; returns why it ended, and prints that if it failed.

        Raises:
          UsageError: the servers belong to another run.
        """
        try:
            with Drawing(monitor.draw_learning_curve, self.display.message):
                return self._train(checkpoints, monitor, resumed)
        except UsageError:
            raise
        except Exception as error:  # of any kind: the summary must be written
            self.failures += 1
            logging.exception('the run failed')
            self.display.message(f'run.py: {self._failure(error)}')
            return f'{_FAILED}: {self._failure(error)}'

    def _failure(self, error: Exception) -> str:
        """Why the run failed, the remedy if one is known, and what that costs."""
        if isinstance(error, OSError):
            text = f'{self.directory.path}: {reason_of(error)}'
        else:
            kind = '' if isinstance(error, FAILURES) else f'unexpected {type(error).__name__}: '
            text = f'{kind}{error}'
        return '; '.join([with_remedy(text, error), *getattr(error, '__notes__', ())])

    def _write_summary(self, monitor: Monitor, reason: str, outcome: Outcome) -> bool:
        """Ends the display, writes summary and learning curve; returns whether it succeeded."""
        self.display.end(monitor.state())
        try:
            monitor.write_summary(reason, outcome.evaluation, outcome.exported)
        except Exception as error:  # of any kind: checkpoint and evaluation are already written
            logging.exception('results')
            self.display.message(with_remedy(f'run.py: {self.directory.path}: {error}', error))
            return False
        return True

    def _monitor_config(self) -> MonitorConfig:
        return MonitorConfig(
            game=self.config.environment.game,
            preset=self.config.preset,
            seed=self.config.run.seed,
            max_frames=self.config.run.max_frames,
            action_repeat=self.config.environment.action_repeat,
            unit=self.config.environment.unit,
            batch_size=self.config.learner.batch_size,
            settings={'preset': self.config.preset, **config_lib.settings(self.config)},
            launch=(provenance.launches(self.directory.launches_file) or [{}])[-1],
            cores=usable_cores(),
        )

    @contextlib.contextmanager
    def _monitor(self, resumed: Mapping[str, Any] | None) -> Iterator[Monitor]:
        """Opens the monitor, and the writer to Weights & Biases with --wandb_project."""
        config = self._monitor_config()
        with contextlib.ExitStack() as stack:
            known = 'wandb' in config.launch
            wandb = stack.enter_context(self._wandb(config)) if known else None
            yield stack.enter_context(Monitor(self.directory, config, resumed, wandb=wandb))

    def _wandb(self, config: MonitorConfig) -> WandbWriter:
        return WandbWriter(
            self.directory.path,
            self.directory.logs / 'wandb.log',
            {
                **config.launch['wandb'],
                'name': self.directory.path.name,
                'config': {**config.settings, 'launch': config.launch},
            },
            self.display.message,
        )

    def _train(
        self, checkpoints: Checkpoints, monitor: Monitor, resumed: Mapping[str, Any] | None
    ) -> str:
        """Trains until the budget is reached or a signal arrives; returns which."""
        attached = self.launch.parameter_addresses and self.launch.replay_addresses
        self.display.phase('connecting to servers' if attached else 'starting servers')
        self.signals.effect = 'stopping once the servers answer; a second signal stops at once'
        with self._training(checkpoints, monitor, resumed) as training:
            rename_old(self.directory.path / EVALUATION_FILE)  # of the budget before
            return training.run()

    @contextlib.contextmanager
    def _training(
        self, checkpoints: Checkpoints, monitor: Monitor, resumed: Mapping[str, Any] | None
    ) -> Iterator[Training]:
        """Opens servers and everything that supervises them; closes them in reverse order."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.directory.remove_shard_checkpoints)  # after the servers' end
            cluster = Cluster(self._servers(), checkpoints.restore)
            stack.callback(cluster.close)
            cluster.start()  # the servers import TensorFlow while this process does
            layout = self._layout()
            stack.enter_context(cluster)
            addresses = self._addresses(cluster)
            connect = self._connector(addresses, layout)
            client = stack.enter_context(connect())
            saver = Saver(checkpoints, stack.enter_context(connect()), self.display.message)
            owner = str(self.directory.path)
            _claim(client, owner)
            reader = stack.enter_context(TelemetryReader(addresses.telemetry))
            first_submission = (resumed or {}).get('submissions', 0)
            jobs = Jobs(self.config, self.launch, addresses, self.directory, first_submission)
            stack.callback(self._count_failures, cluster, jobs)
            stack.callback(jobs.stop)
            seconds, tell = monitor.wall_seconds, self.display.message
            evaluator = EvaluatorProcess(self.config, self.directory, seconds, tell)
            stack.callback(evaluator.close)
            yield Training(
                self.config,
                self.display,
                owner,
                self.signals,
                cluster,
                client,
                reader,
                jobs,
                monitor,
                saver,
                Replay(addresses.replay, StatusReader(addresses.replay)),
                evaluator,
                self._finishing.prepare,
            )

    def _servers(self) -> ClusterConfig:
        """The servers to start or attach to; tells the user if fewer shards start than named."""
        config = self.launch.started(self.config)
        wanted, shards = (
            each.parameter_server.num_parameter_shards for each in (self.config, config)
        )
        if shards < wanted:
            self.display.message(
                f'--num_parameter_shards {wanted}: {shards} start, one for each core that the run'
                f' may use. To start all, list {wanted} ports in --parameter_ports.'
            )
        return cluster_config(config, self.launch, self.directory.path)

    def _layout(self) -> Layout:
        """Layout of the network; imports TensorFlow and TF-Agents."""
        import tensorflow as tf

        from pipelines.experiment import builders

        with contextlib.suppress(RuntimeError):  # raised if it has already used its devices
            tf.config.set_visible_devices([], 'GPU')  # accelerators are for learners
        return builders.layout_of(builders.build_policy(self.config))

    def _connector(self, addresses: Addresses, layout: Layout) -> Callable[[], ParameterClient]:
        """Makes clients of the parameter shards."""
        return functools.partial(
            ParameterClient,
            addresses.parameters,
            layout,
            shared_memory=False,
            timeout_seconds=SERVER_SECONDS,
            tls_roots=addresses.tls_roots,
        )

    def _count_failures(self, cluster: Cluster, jobs: Jobs) -> None:
        self.failures += cluster.failures + jobs.failures

    def _addresses(self, cluster: Cluster) -> Addresses:
        roots = self.launch.tls_roots
        return Addresses(
            cluster.parameter_addresses,
            cluster.replay_addresses,
            cluster.telemetry_address,
            read_roots(roots) if roots else None,
        )


def exit_reason(reason: str, signal_name: str) -> str:
    """Why a run ended, given the name of the user's signal (may be empty); keeps a failure."""
    if not signal_name:
        return reason
    return f'{signal_name}; {reason}' if reason.startswith(_FAILED) else signal_name


def _claim(client: ParameterClient, run: str) -> None:
    """Claims the parameter shards for this run.

    Raises:
      UsageError: they hold the parameters of another network, or belong to another run.
    """
    try:
        client.claim(run)
    except (LayoutMismatchError, RequestRefusedError) as error:
        raise UsageError(str(error)) from error


def mirrored(launcher: Launcher, remote: 'RemoteRun') -> int:
    """Calls `Launcher.run` and copies its directory to the remote place, during and after it."""
    from pipelines.storage.mirror import Mirror  # imports Beam

    with Mirror(remote, launcher.directory, launcher.display.message) as mirror:
        code = launcher.run()
        launcher.display.phase(f'copying to {remote.url}')
    launcher.display.end()
    local = launcher.directory.path
    if mirror.problem:
        launcher.display.message(
            f'run.py: {remote.url}: incomplete ({mirror.problem}); {local} is complete. Fix: run'
            f' {command("mirror", local)}.'
        )
        return _FAILED_EXIT_CODE
    if not launcher.directory.unwanted(None):
        launcher.display.message(f'{remote.url} is complete')
    return code


def launch(
    config: ExperimentConfig,
    launch_: Launch,
    directory: RunDirectory,
    remote: 'RemoteRun | None' = None,
) -> int:
    """Runs the experiment in `directory`, a working copy of `remote`; returns the exit code.

    Raises:
      UsageError: a resumed run has no readable checkpoint.
    """
    # force: Beam's modules log during their import, which installs a handler.
    log_file = pathlib.Path(directory.logs) / 'launcher.log'
    logging.basicConfig(filename=log_file, level=logging.INFO, force=True)
    logging.raiseExceptions = False  # on a full disk result writers report it, not the log
    with (
        temporary_files(),
        open_display() as display,
        Signals(display, directory) as signals,
    ):
        launcher = Launcher(config, launch_, directory, display, signals)
        return launcher.run() if remote is None else mirrored(launcher, remote)
