"""How a run is launched: runner, directory and servers in one frozen value, all defaults."""

import dataclasses

from pipelines.engines import catalog

LOOPBACK = '127.0.0.1'


@dataclasses.dataclass(frozen=True)
class Launch:
    """How to launch: what is not part of the experiment itself."""

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
    tls: tuple[str, str] | None = None  # files of certificate and key, of servers that are started
    tls_roots: str | None = None  # file
    actor_flags: tuple[str, ...] = ()
    learner_flags: tuple[str, ...] = ()

    def flags_of(self, kind: str) -> tuple[str, ...]:
        """Beam's flags of one job only; a bundle is above all a learner."""
        return self.actor_flags if kind == 'actor' else self.learner_flags

    @property
    def engine(self) -> catalog.Engine:
        """What runs the jobs."""
        return catalog.engine(self.runner)


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the servers are, each `host:port`.

    Attributes:
      parameters: parameter shards, in order.
      replay: replay shards, in order; none in the bundled topology.
      telemetry: the Reverb server with the telemetry queue.
      tls_roots: PEM, what the certificates of the parameter shards are signed by; None: no TLS.
    """

    parameters: tuple[str, ...]
    replay: tuple[str, ...]
    telemetry: str
    tls_roots: bytes | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every one of them."""
        return (*self.parameters, *self.replay, self.telemetry)
