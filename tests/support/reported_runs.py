"""Small runs as the project's own writers write them, for tests of the report."""

import functools
import json
import pathlib
from typing import Any
from unittest import mock

import numpy as np

from agents.config import STALENESS_BOUNDS
from infra.disk import write_json
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.experiment.protocols import PROTOCOLS
from pipelines.monitoring.monitor import Monitor, MonitorConfig
from pipelines.storage import provenance
from pipelines.storage.run_directory import RunDirectory

_SECONDS_PER_GAME, _STEPS_PER_GAME = 30.0, 50  # 200 frames
_START = 1_795_000_000.0  # seconds since 1970


class _Clock:
    """Seconds that pass only when told to; also in place of the module `time`."""

    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now

    time = __call__

    def time_ns(self) -> int:
        return int(self.now * 1e9)


def make_run(
    path: pathlib.Path,
    game: str,
    seed: int,
    score: float | None,
    games: int = 40,
    resumed_after_seconds: float | None = None,
    **settings: Any,
) -> pathlib.Path:
    """Writes a run of `games` games of 200 frames, whose returns rise from -21 by 2.

    Args:
      path: of its directory.
      game, seed, settings: of its configuration; default of `preset`: laptop.
      score: mean of its evaluation; None: no evaluation.
      games: number of training games.
      resumed_after_seconds: pause before a second launch with as many games; None: no such launch.
    """
    values = {'game': game, 'seed': seed, **settings}
    config = presets.experiment(values.pop('preset', 'laptop'), values)
    with RunDirectory.open(path) as directory:
        directory.config_file.write_text(config_lib.to_json(config))
        clock = _Clock(_START)
        counters = _launch(directory, config, clock, games, None, score)
        if resumed_after_seconds is not None:
            clock.now += resumed_after_seconds
            _launch(directory, config, clock, games, counters, score)
    if score is not None:
        write_json(path / 'evaluation.json', evaluation(score))
    rows = [evaluation(mean) | {'frames': frames} for frames, mean in ((2000, -10.0), (6000, 5.0))]
    (path / 'evaluations.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def _launch(
    directory: RunDirectory,
    config: config_lib.ExperimentConfig,
    clock: _Clock,
    games: int,
    resumed_from: dict[str, Any] | None,
    score: float | None,
) -> dict[str, Any]:
    """Plays one launch; returns its counters."""
    row = _described() | {'command': f'pipelines/run.py --seed {config.run.seed}'}
    row |= {'engine': 'DirectRunner', 'resumed': resumed_from is not None, 'changed': {}}
    row |= {'time': _iso(clock.now), 'cores': 2 if resumed_from is None else 4}
    row |= {'wall_seconds': (resumed_from or {}).get('wall_seconds', 0.0)}
    provenance.add_launch(directory.launches_file, row)
    environment = config.environment
    settings = MonitorConfig(
        *(environment.game, config.preset, config.run.seed, 8000),
        action_repeat=environment.action_repeat,
        unit=environment.unit,
    )
    before = (resumed_from or {}).get('agent_steps', 0)
    # The first event of a file has the time of the real clock.
    with (
        mock.patch('pipelines.monitoring.tensorboard.time', clock),
        # No report reads the picture, which takes most of the time.
        mock.patch('pipelines.monitoring.learning_curve.draw_learning_curve'),
        Monitor(directory, settings, resumed_from, clock, clock) as monitor,
    ):
        for number in range(1, games + 1):
            clock.now += _SECONDS_PER_GAME
            steps = before + number * _STEPS_PER_GAME
            monitor.clock(updates=number * 12, agent_steps=steps)
            monitor.fold(_events(number, steps, clock.now))
            monitor.tick()
        monitor.write_summary('max_frames', None if score is None else evaluation(score))
        return monitor.counters()


@functools.cache
def _described() -> dict[str, Any]:
    """This process; git takes seconds on a busy machine."""
    return provenance.describe([])


def _events(number: int, steps: int, now: float) -> list[dict[str, Any]]:
    staleness = [0] * (len(STALENESS_BOUNDS) + 1)
    staleness[2], staleness[3] = 9 * number, 3 * number
    episode = {'kind': 'episode', 'component': 'actor', 'worker': 0, 'time': now}
    episode |= {'raw_return': -23.0 + 2 * number, 'clipped_return': 1.0, 'epsilon': 0.1}
    episode |= {
        'agent_steps': _STEPS_PER_GAME,
        'run_agent_steps': steps,
        'run_updates': 12 * number,
    }
    learner = {'kind': 'learner', 'component': 'learner', 'worker': 0, 'session': 's'}
    learner |= {'loss': 1 / number, 'rejected_outlier': number // 8, 'staleness': staleness}
    learner |= {'gradients': 12 * number}
    actor = {'kind': 'actor', 'component': 'actor', 'worker': 0}
    actor |= {'agent_steps': number * _STEPS_PER_GAME}
    alive = {'kind': 'heartbeat', 'component': 'learner', 'worker': 0, 'memory_bytes': 3 * 2**28}
    return [episode, learner, actor, alive]


def _iso(seconds: float) -> str:
    return str(np.datetime64(int(seconds), 's')) + '+00:00'


def evaluation(
    mean: float, protocol: str = 'noop', episodes: int | None = None, **others: Any
) -> dict[str, Any]:
    """A result as `evaluate.py` writes it, without the details of its games.

    Args:
      mean: of the returns.
      protocol: its name.
      episodes: games; None: the protocol's.
      others: further values.
    """
    rules = PROTOCOLS[protocol]
    episodes = rules.episodes if episodes is None else episodes
    values = {'protocol': protocol, 'deviations': {}, 'epsilon': rules.epsilon, 'failed': 0}
    values |= {'max_frames': rules.max_frames, 'episodes': episodes, 'mean': mean, 'std': 0.0}
    starts = {'file': 'starts.json', 'source': 'person', 'count': rules.episodes}
    values |= {'starts': starts if rules.starts else None}
    policy = {'kind': 'run', 'path': 'runs/run', 'checkpoint': 'checkpoint-1', 'updates': 480}
    return {**values, 'policy': policy, 'updates': 480, 'returns': [mean] * episodes, **others}


def make_video(file: pathlib.Path, frames: int = 60) -> None:
    """Writes an H.264 film of two seconds: a square that moves."""
    import av

    with av.open(str(file), 'w') as container:
        stream = container.add_stream('libx264', rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 208, 'yuv420p'
        for index in range(frames):
            picture = np.full((208, 160, 3), 30, np.uint8)
            picture[90:120, 2 * index : 2 * index + 30] = (230, 160, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
