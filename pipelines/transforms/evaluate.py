"""Evaluate: games in, the scores of each policy out (one game an element).

Workers share a directory, local or remote, with the launcher: it holds policies and start points,
and receives the record of each game and the scores of each policy.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

from pipelines.evaluation.play import Failure, Game, Score
from pipelines.evaluation.players import Players
from pipelines.evaluation.policies import Policy, unpacked
from pipelines.evaluation.results import combined, encoded
from pipelines.evaluation.starts import Start
from pipelines.experiment.config import ExperimentConfig
from pipelines.workers.process import prepare_process

Record = Score | Failure


@dataclasses.dataclass(frozen=True)
class Shared:
    """The files in the directory that workers and launcher share.

    Attributes:
      directory: its path, local or remote.
    """

    directory: str

    def policy(self, index: int) -> str:
        """A packed policy."""
        return self._file(f'policy-{index}.npz')

    def starts(self, index: int) -> str:
        """Start points of a policy's games, as hexadecimal texts in JSON."""
        return self._file(f'starts-{index}.json')

    def played(self, policy: int, episode: int) -> str:
        """The record of a game."""
        return self._file(f'played-{policy}-{episode}.json')

    def scores(self, index: int) -> str:
        """The scores of a policy."""
        return self._file(f'scores-{index}.json')

    def _file(self, name: str) -> str:
        return FileSystems.join(self.directory, name)


def read_json(path: str) -> Any:
    """Reads a small JSON file.

    Raises:
      OSError: it does not exist or cannot be read.
      ValueError: it is damaged.
    """
    with FileSystems.open(path) as file:
        return json.loads(file.read())


def write_json(path: str, values: Any) -> None:
    """Writes a small JSON file."""
    with FileSystems.create(path) as file:
        file.write(json.dumps(values).encode())


class Play(beam.DoFn):
    """Plays games. A game that fails becomes a `Failure`; the other games stand."""

    _games = Metrics.counter('evaluation', 'games')
    _failures = Metrics.counter('evaluation', 'failures')
    _frames = Metrics.distribution('evaluation', 'frames_per_game')

    def __init__(self, shared: Shared, hang_seconds: float):
        self._shared, self._hang_seconds = shared, hang_seconds

    def setup(self) -> None:
        self._players = Players(self._policy, self._hang_seconds)
        self._starts: dict[int, list[Start]] = {}

    def process(self, game: Game) -> Iterator[Record]:
        """Plays one game; keeps its record, again with the same name if the engine repeats it."""
        record = self._played(game)
        write_json(self._shared.played(game.policy, game.episode), encoded(record))
        yield record

    def _played(self, game: Game) -> Record:
        try:
            record: Record = self._players.played(self._with_start(game))
        except (OSError, ValueError) as error:
            record = Failure.of(game, error)
        if isinstance(record, Failure):
            self._failures.inc()
        else:
            self._games.inc()
            self._frames.update(record.frames)
        return record

    def _with_start(self, game: Game) -> Game:
        if game.start_index is None:
            return game
        if game.policy not in self._starts:
            texts = read_json(self._shared.starts(game.policy))
            self._starts[game.policy] = [Start(bytes.fromhex(text)) for text in texts]
        return dataclasses.replace(game, start=self._starts[game.policy][game.start_index])

    def _policy(self, index: int) -> Policy:
        with FileSystems.open(self._shared.policy(index)) as file:
            found = unpacked(file.read())
        if found.experiment is not None or found.saved_model is not None:
            prepare_process(found.experiment or ExperimentConfig(), learns=False)
        return found


class Combine(beam.CombineFn):
    """Combines a policy's games to its scores (see `combined`)."""

    def create_accumulator(self) -> list[Record]:
        return []

    def add_input(self, games: list[Record], game: Record) -> list[Record]:
        games.append(game)
        return games

    def merge_accumulators(self, parts: Iterable[list[Record]]) -> list[Record]:
        return [game for part in parts for game in part]

    def extract_output(self, games: list[Record]) -> Mapping[str, Any]:
        return combined(games)


class Evaluate(beam.PTransform):
    """Plays games in parallel and combines the scores of each policy.

    Input: a pipeline. Output: (policy's index, its scores).
    """

    def __init__(self, games: Iterable[Game], shared: Shared, hang_seconds: float):
        super().__init__()
        # Start points are in the shared directory: a job's size is limited.
        self._games = [dataclasses.replace(game, start=None) for game in games]
        self._shared, self._hang_seconds = shared, hang_seconds

    def expand(self, pipeline):
        return (
            pipeline
            | 'Games' >> beam.Create(self._games)
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: games run in all workers
            | 'Play' >> beam.ParDo(Play(self._shared, self._hang_seconds))
            | 'Key by policy' >> beam.Map(lambda record: (record.policy, record))
            | 'Combine' >> beam.CombinePerKey(Combine())
        )


class Write(beam.DoFn):
    """Writes the scores of a policy to the shared directory."""

    def __init__(self, shared: Shared):
        self._shared = shared

    def process(self, scores: tuple[int, Mapping[str, Any]]) -> None:
        """Writes one file, again with the same content if the engine repeats the element."""
        policy, values = scores
        write_json(self._shared.scores(policy), values)
