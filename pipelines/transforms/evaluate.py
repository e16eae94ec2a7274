"""Evaluate: games in, the scores of each policy out (one game an element)."""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

from pipelines.evaluation.play import Failure, Game, Score, play
from pipelines.evaluation.policies import Player, unpacked
from pipelines.evaluation.results import combined
from pipelines.experiment.config import ExperimentConfig
from pipelines.workers.process import prepare_process


def policy_file(directory: str, policy: int) -> str:
    """Path of a packed policy in the evaluation's shared directory."""
    return FileSystems.join(directory, f'policy-{policy}.npz')


def scores_file(directory: str, policy: int) -> str:
    """Path of a policy's scores in the evaluation's shared directory."""
    return FileSystems.join(directory, f'scores-{policy}.json')


def played_files(directory: str) -> str:
    """Pattern of the files that mark finished games."""
    return FileSystems.join(directory, 'played-*')


class Play(beam.DoFn):
    """Plays games. A game that fails becomes a `Failure`; the other games stand."""

    _games = Metrics.counter('evaluation', 'games')
    _failures = Metrics.counter('evaluation', 'failures')
    _frames = Metrics.distribution('evaluation', 'frames_per_game')

    def __init__(self, directory: str):
        self._directory = directory

    def setup(self) -> None:
        self._players: dict[int, Player] = {}

    def process(self, game: Game) -> Iterator[Score | Failure]:
        """Plays one game."""
        try:
            score = play(game, self._player(game.policy)())
        except Exception as error:  # of any kind: a policy may be the user's own
            self._failures.inc()
            yield Failure.of(game, error)
        else:
            self._games.inc()
            self._frames.update(score.frames)
            yield score
        # Again with the same name if the engine repeats the element.
        name = FileSystems.join(self._directory, f'played-{game.policy}-{game.episode}')
        FileSystems.create(name).close()

    def _player(self, policy: int) -> Player:
        """The policy, opened once in a process."""
        if policy not in self._players:
            with FileSystems.open(policy_file(self._directory, policy)) as file:
                opened = unpacked(file.read())
            if opened.experiment is not None or opened.saved_model is not None:
                prepare_process(opened.experiment or ExperimentConfig(), learns=False)
            self._players[policy] = opened.player()
        return self._players[policy]


class Combine(beam.CombineFn):
    """Combines a policy's games to its scores (see `combined`)."""

    def create_accumulator(self) -> list[Score | Failure]:
        return []

    def add_input(self, games: list[Any], game: Score | Failure) -> list[Score | Failure]:
        return [*games, game]

    def merge_accumulators(self, parts: Iterable[list[Any]]) -> list[Score | Failure]:
        return [game for part in parts for game in part]

    def extract_output(self, games: list[Score | Failure]) -> dict[str, Any]:
        return combined(games)


class Evaluate(beam.PTransform):
    """Plays games in parallel and combines the scores of each policy.

    Input: a pipeline. Output: (policy's index, its scores).
    """

    def __init__(self, games: Iterable[Game], directory: str):
        """`directory` is local or remote, shared by all workers, and holds the packed policies."""
        super().__init__()
        self._games = list(games)
        self._directory = directory

    def expand(self, pipeline):
        return (
            pipeline
            | 'Games' >> beam.Create(self._games)
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: games run in all workers
            | 'Play' >> beam.ParDo(Play(self._directory))
            | 'Key by policy' >> beam.Map(lambda played: (played.policy, played))
            | 'Combine' >> beam.CombinePerKey(Combine())
        )


class Write(beam.DoFn):
    """Writes the scores of a policy to the evaluation's shared directory."""

    def __init__(self, directory: str):
        self._directory = directory

    def process(self, scores: tuple[int, dict[str, Any]]) -> None:
        """Writes one file, again with the same content if the engine repeats the element."""
        policy, values = scores
        with io.TextIOWrapper(FileSystems.create(scores_file(self._directory, policy))) as file:
            json.dump(values, file)
