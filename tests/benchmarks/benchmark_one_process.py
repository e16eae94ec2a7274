"""An agent in one process, with gradients of a chosen staleness and encoding; prints JSON.

    python -m tests.benchmarks.benchmark_one_process --flags="--environment CartPole-v1" \\
        --staleness 0,1,10,100,1000 --seeds 1,2,3

An actor, a replay and a learner take turns, as in a bundle; the optimizer's step is a call. A
gradient is applied when as many others have been since it was computed. So `--staleness 0` is the
agent without any distribution: its score and CPU time are what a distributed run compares with.
With `--wires` each gradient is what a single shard on another host gets of it; parameters stay as
they are.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from infra.parameter_server.checkpoint import AVERAGE
from infra.parameter_server.client import Clock, PushReply, Snapshot
from infra.parameter_server.wire import WIRES, Feedback
from pipelines.evaluation.play import Game, play
from pipelines.experiment import builders, command_line
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.protocols import PROTOCOLS
from pipelines.workers import boxes
from pipelines.workers.bundle import bundled
from pipelines.workers.process import prepare_process
from pipelines.workers.spec import WorkerSpec

_PERIOD, _LAST = 5_000, 10  # updates between points of a curve, games of each


class DelayedParameters:
    """The parameter client's interface to an optimizer in this process, with late gradients.

    Gradients pass through the encoding of the parameter server's `wire`; parameters do not.
    """

    def __init__(self, config: ExperimentConfig, values: np.ndarray, staleness: int):
        from infra.parameter_server.optimizers import OptimizedSlice

        encoding = WIRES[config.parameter_server.wire].gradients
        self._feedback = Feedback(encoding, len(values))
        self._slice = OptimizedSlice(config.parameter_server, len(values))
        self._slice.initialise(values)
        self._period = config.parameter_server.target_update_period
        self._target, self._target_version = values.copy(), 0
        self._staleness = staleness
        self._late: collections.deque[np.ndarray] = collections.deque()
        self._agent_steps = self.updates = 0

    @property
    def values(self) -> np.ndarray:
        """The parameters, float32 [parameters]."""
        return self._slice.parameters

    @property
    def average(self) -> np.ndarray:
        """Their moving average, float32 [parameters]; the parameters if none is kept."""
        return self._slice.state.get(AVERAGE, self.values)

    def another(self) -> 'DelayedParameters':
        """A client for another thread."""
        return self

    def close(self) -> None:
        """Nothing is open."""

    def initialise(self, values: np.ndarray) -> bool:
        """They are initialised."""
        return False

    def pull(self, agent_steps: int = 0) -> Snapshot:
        """Counts agent steps; returns the parameters."""
        self._agent_steps += agent_steps
        return self._snapshot(self.values)

    def pull_target(self) -> Snapshot:
        """Returns the target network's parameters."""
        return self._snapshot(self._target)

    def push(self, gradient: np.ndarray, version: int, pull: bool = True) -> PushReply:
        """Applies the gradient pushed `staleness` updates ago."""
        waiting = len(self._late)
        self._feedback.encode(gradient)
        self._feedback.accepted()
        self._late.append(self._feedback.arrived.copy())
        if waiting == self._staleness:
            self.updates += 1
            self._slice.step(self._late.popleft(), self.updates)
            if self.updates % self._period == 0:
                self._target, self._target_version = self.values.copy(), self.updates
        return PushReply(self.pull(), None, '', waiting)

    def push_async(self, gradient: np.ndarray, version: int, pull: bool = True) -> Future:
        """As `push`, which is done at once."""
        done: Future = Future()
        done.set_result(self.push(gradient, version, pull))
        return done

    def _snapshot(self, values: np.ndarray) -> Snapshot:
        clock = Clock(self.updates, self._agent_steps, stopping=False)
        return Snapshot((values,), self.updates, (self._target_version,), clock)


class Games:
    """Telemetry that keeps the returns of the training games.

    Attributes:
      returns: (updates of the run, return) of each game, in the order of their ends.
    """

    def __init__(self) -> None:
        self.returns: list[tuple[int, float]] = []

    def record(self, kind: str, **fields: Any) -> None:
        """Keeps a finished game."""
        if kind == 'episode':
            self.returns.append((fields['run_updates'], fields['raw_return']))

    def curve(self) -> list[tuple[int, float]]:
        """(updates, mean return of the last ten games), once in each `_PERIOD` updates."""
        points, due = [], _PERIOD
        for number in range(_LAST, len(self.returns) + 1):
            updates = self.returns[number - 1][0]
            if updates >= due:
                last = [value for _, value in self.returns[number - _LAST : number]]
                points.append((updates, round(float(np.mean(last)), 2)))
                due = _PERIOD * (updates // _PERIOD + 1)
        return points

    def flush(self) -> bool:
        """Nothing waits."""
        return True


def train(config: ExperimentConfig, staleness: int, games: Games) -> DelayedParameters:
    """Trains an agent to the budget; returns its parameters."""
    spec = WorkerSpec(0, 0)
    network = boxes.learners_network(config, spec)
    parameters = DelayedParameters(config, network.parameters(), staleness)
    worker: Any = boxes.Enlisted(spec, 0, games, network, parameters)  # type: ignore[arg-type]
    with bundled(config, worker) as bundle:
        segment = 0
        while not bundle.finished():
            bundle.run_segment(segment)
            bundle.take()
            segment += 1
    return parameters


def returns(config: ExperimentConfig, values: np.ndarray, games: int) -> Iterator[float]:
    """Returns of games by the preset's evaluation protocol, with its epsilon."""
    policy = builders.build_policy(config)
    policy.set_parameters(values)
    rules = PROTOCOLS[config.run.evaluation_protocol]
    for episode in range(games):
        game = Game(0, episode, config.run.seed, config.environment, rules)
        yield play(game, lambda observation: int(policy.act(observation)[0])).value


def measure(config: ExperimentConfig, staleness: int, games: int) -> dict[str, Any]:
    """Trains and evaluates one agent.

    `mean_return` is that of the policy that a run would evaluate, `newest_mean_return` that of the
    newest parameters if the run would use their moving average, `curve` that of training games.
    """
    wall, cpu = time.monotonic(), time.process_time()
    training = Games()
    parameters = train(config, staleness, training)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    played = {'mean_return': parameters.average}
    if config.parameter_server.average_updates:
        played['newest_mean_return'] = parameters.values
    scores = {name: list(returns(config, values, games)) for name, values in played.items()}
    return {
        'staleness': staleness,
        'wire': config.parameter_server.wire,
        'seed': config.run.seed,
        'updates': parameters.updates,
        'wall_seconds': round(wall, 1),
        'cpu_seconds': round(cpu, 1),
        **{name: float(np.mean(values)) for name, values in scores.items()},
        'curve': training.curve(),
    }


def main() -> None:
    """Prints a line for each encoding, staleness and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--flags', default='--environment CartPole-v1', help='flags of a run')
    parser.add_argument('--staleness', default='0,1,10,100,1000', help='in updates, with commas')
    parser.add_argument(
        '--wires', help='encodings of gradients, with commas; default: that of --flags'
    )
    parser.add_argument('--seeds', default='1,2,3', help='with commas')
    parser.add_argument('--games', type=int, default=30, help='of each evaluation')
    options = parser.parse_args()
    topology = ['--topology=bundled', '--num_actors=1', '--num_learners=1']
    flags = [*shlex.split(options.flags), *topology]
    _, preset, values = command_line.parse(flags)
    config = command_line.experiment(preset, values)
    prepare_process(config, learns=False)  # one core: one operation at a time
    wires = options.wires.split(',') if options.wires else [config.parameter_server.wire]
    servers = [dataclasses.replace(config.parameter_server, wire=wire) for wire in wires]
    numbers = map(int, options.staleness.split(',')), map(int, options.seeds.split(','))
    for server, staleness, seed in itertools.product(servers, *numbers):
        run = dataclasses.replace(config.run, seed=seed)
        one = dataclasses.replace(config, run=run, parameter_server=server)
        print(json.dumps(measure(one, staleness, options.games)), flush=True)


if __name__ == '__main__':
    main()
