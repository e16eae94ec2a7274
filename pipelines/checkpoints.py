"""Checkpoints of a whole run: parameters, optimizer, target, replay and counters, together.

In: running servers. Out: `checkpoints/checkpoint-<n>/` with `parameters/`, `replay/shard-<i>/` and
`run.json`, published only when all of it is written; and, for a resumed run, where each server
starts from.
"""

import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.cluster import PARAMETER_SERVER
from infra.parameter_server import checkpoint as parameter_checkpoint
from infra.parameter_server.client import ParameterClient
from infra.replay import server as replay_server
from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.run_directory import CHECKPOINT_RUN_FILE, RunDirectory, read_json, write_json

_KEEP = 2


class Checkpoints:
    """Writes a run's checkpoints and knows which one its servers start from."""

    def __init__(self, directory: RunDirectory, config: ExperimentConfig):
        self._directory = directory
        self._config = config
        self._newest: pathlib.Path | None = None

    def open(self, resume: bool, tell: Callable[[str], None]) -> Mapping[str, Any] | None:
        """Finds the newest checkpoint that can be read; returns its counters, None for a new run.

        A damaged one is set aside, and `tell` is told.

        Raises:
          UsageError: `resume`, and no checkpoint can be read.
        """
        if not resume:
            return None
        for path in self._directory.latest_checkpoints():
            try:
                parameter_checkpoint.validate(str(path / 'parameters'))
                counters = read_json(path / CHECKPOINT_RUN_FILE)
                if counters is None:
                    raise parameter_checkpoint.DamagedCheckpointError(f'{path}: no run.json')
            except parameter_checkpoint.DamagedCheckpointError as error:
                aside = self._directory.set_aside(path)
                tell(f'{error}; kept as {aside.name}, trying the checkpoint before')
                continue
            self._newest = path
            tell(f'going on from {path.name}: {counters["updates"]} updates')
            return counters
        raise UsageError(
            f'{self._directory.path}: no checkpoint can be read; start a new run in another'
            ' --run_dir.'
        )

    def restore(self, component: str, shard: int) -> pathlib.Path | None:
        """Where a server (re)starts from; None: empty."""
        if self._newest is None:
            return None
        if component == PARAMETER_SERVER:
            return self._newest / 'parameters'
        replay = self._newest / 'replay' / f'shard-{shard}'
        return replay if replay.exists() else None

    def save(
        self, client: ParameterClient, replay: Sequence[str], counters: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint, publishes it, and removes all but the newest two.

        Raises:
          OSError: it cannot be written; nothing is published.
          ParameterServerError: a shard did not write its part; nothing is published.
          ReplayUnavailable: likewise.
        """
        with self._directory.new_checkpoint() as staging:
            client.save(staging / 'parameters')
            if replay and self._config.run.checkpoint_replay:
                (staging / 'replay').mkdir()
                for shard, path in enumerate(replay_server.save(replay)):
                    shutil.move(path, staging / 'replay' / f'shard-{shard}')
            write_json(staging / CHECKPOINT_RUN_FILE, counters)
        self._newest = self._directory.latest_checkpoints()[0]
        self._directory.prune(_KEEP)
        logging.info('wrote %s', self._newest)
