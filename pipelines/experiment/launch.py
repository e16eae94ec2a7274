"""How a run is launched and where its servers are, as frozen values."""

import dataclasses

from infra.cores import whole_cores
from pipelines.engines import catalog
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.job_settings import JobSettings

LOOPBACK = '127.0.0.1'


@dataclasses.dataclass(frozen=True)
class Launch:
    """Settings of a launch that are not part of the experiment."""

    runner: str
    run_dir: str | None
    resume: bool
    parameter_addresses: tuple[str, ...]
    replay_addresses: tuple[str, ...]
    parameter_ports: tuple[int, ...]
    replay_ports: tuple[int, ...]
    beam_flags: tuple[str, ...]
    host: str = LOOPBACK
    work_dir: str | None = None
    tls: tuple[str, str] | None = None  # certificate and key files of servers to start
    tls_roots: str | None = None  # file
    actor_flags: tuple[str, ...] = ()
    learner_flags: tuple[str, ...] = ()
    wandb_project: str | None = None
    one_job: bool = False
    jobs: JobSettings = JobSettings()

    def flags_of(self, kind: str) -> tuple[str, ...]:
        """Beam flags of one kind of job; bundles take the learners' flags."""
        return self.actor_flags if kind == 'actor' else self.learner_flags

    @property
    def engine(self) -> catalog.Engine:
        """The engine that runs the jobs."""
        return catalog.engine(self.runner)

    def started(self, config: ExperimentConfig) -> ExperimentConfig:
        """The experiment with as many parameter shards as a run of it has.

        A run starts all on one machine, where more than its cores only cost messages; fewer, larger
        ones apply the same updates. With an address or a port for each it has all.
        """
        if self.parameter_addresses or self.parameter_ports:
            return config
        settings = config.parameter_server
        shards = min(settings.num_parameter_shards, whole_cores())
        settings = dataclasses.replace(settings, num_parameter_shards=shards)
        return dataclasses.replace(config, parameter_server=settings)


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Addresses of the servers, each `host:port`.

    Attributes:
      parameters: parameter shards, in order.
      replay: replay shards, in order; empty in the bundled topology.
      telemetry: the Reverb server with the telemetry queue.
      tls_roots: PEM root certificates of the parameter shards; None disables TLS.
    """

    parameters: tuple[str, ...]
    replay: tuple[str, ...]
    telemetry: str
    tls_roots: bytes | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """All addresses."""
        return (*self.parameters, *self.replay, self.telemetry)
