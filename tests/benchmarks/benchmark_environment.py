"""CPU time per agent step of the environment and of the frame stack; prints JSON.

Run it on one core: taskset -c 0 python -m tests.benchmarks.benchmark_environment
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from agents.config import EnvironmentConfig
from agents.environments.atari import AtariEnvironment
from agents.environments.frames import FrameStack

_ROUNDS = 9


def cpu_us(action: Callable[[], object], repeats: int, divisor: int) -> float:
    """Median over rounds of the process's CPU time of one `action`, in us, over `divisor`."""
    times = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        for _ in range(repeats):
            action()
        times.append(1e6 * (time.process_time() - start) / repeats / divisor)
    return round(statistics.median(times), 1)


def measure(game: str, num_environments: int, repeats: int) -> dict[str, float]:
    """CPU us per agent step of one environment of a batch."""
    random = np.random.default_rng(0)
    with AtariEnvironment(EnvironmentConfig(game=game), num_environments, seed=0) as games:
        start = time.process_time()
        frames = games.reset()
        reset_ms = 1e3 * (time.process_time() - start)
        stack = FrameStack(num_environments, games.config.frame_stack, games.frame_spec)
        actions = random.integers(games.num_actions, size=num_environments, dtype=np.int32)
        return {
            'reset_ms': round(reset_ms, 1),
            'step_us': cpu_us(lambda: games.step_frames(actions), repeats, num_environments),
            'stack_us': cpu_us(
                lambda: stack.push(frames.frame, np.zeros(num_environments, bool)),
                repeats,
                num_environments,
            ),
        }


def main() -> None:
    """Measures a few games and batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=60, help='steps of the batch per round')
    parser.add_argument('--games', nargs='+', default=['pong', 'breakout', 'seaquest'])
    parser.add_argument('--environments', type=int, nargs='+', default=[1, 8])
    options = parser.parse_args()
    result = {
        game: {count: measure(game, count, options.repeats) for count in options.environments}
        for game in options.games
    }
    print(json.dumps({'unit': 'CPU us per agent step', 'games': result}, indent=2))


if __name__ == '__main__':
    main()
