"""Time of a learner's gradient and of an actor's inference; prints JSON.

    taskset -c 0 python -m tests.benchmarks.benchmark_gradient      # CPU time on one core
    python -m tests.benchmarks.benchmark_gradient --operations 2    # wall time on two cores

oneDNN's kernels are chosen when TensorFlow is loaded, so each setting has processes of its own,
taken in turn; within a process the measurements interleave, and times are medians over all rounds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from agents.config import PRECISIONS, TORSOS, AgentConfig, EnvironmentConfig, NetworkConfig
from infra.replay.trajectory import Transition

_BATCH, _ENVIRONMENTS, _NUM_ACTIONS = 32, 8, 6
_MODULE = 'tests.benchmarks.benchmark_gradient'
_ONEDNN = 'TF_ENABLE_ONEDNN_OPTS'


def _frames(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, size, size, 4), dtype=np.uint8)


def _agent_actions(torso: str, double_dqn: bool, precision: str) -> dict[str, Callable[[], object]]:
    """What a learner and an actor do with one agent."""
    import tensorflow as tf

    from agents import dqn, py_environment
    from agents.gradient import AgentGradient
    from agents.model import family_model
    from agents.policy import GreedyPolicy

    screen_size = 42 if torso.endswith('half') else 84
    agent = dqn.make_agent(
        AgentConfig(double_dqn=double_dqn),
        NetworkConfig(torso, precision=precision),
        py_environment.time_step_spec(EnvironmentConfig(screen_size=screen_size)),
        py_environment.action_spec(_NUM_ACTIONS),
    )
    learner = AgentGradient(family_model(agent), gradient_clip_norm=10.0)
    policy = GreedyPolicy(family_model(agent))
    frames = tf.constant(_frames(_BATCH, screen_size))
    transition = Transition(
        frames, tf.zeros(_BATCH, tf.int32), tf.ones(_BATCH), tf.ones(_BATCH), frames
    )
    parameters, observation = learner.parameters(), _frames(_ENVIRONMENTS, screen_size)
    name = f'{torso}{"_double" if double_dqn else ""}_{precision}'
    actions: dict[str, Callable[[], object]] = {
        f'{name}_gradient': lambda: learner.gradient(transition)
    }
    if not double_dqn:
        actions[f'{name}_set_parameters'] = lambda: learner.set_parameters(parameters)
        actions[f'{name}_inference_of_{_ENVIRONMENTS}'] = lambda: policy.act(observation)
    return actions


def _dense_actions() -> dict[str, Callable[[], object]]:
    """The Nature network's dense layer and its gradients, ours and TensorFlow's."""
    import tensorflow as tf

    from agents import networks

    x, kernel = tf.random.normal([_BATCH, 3136]), tf.random.normal([512, 3136])
    stock_kernel = tf.transpose(kernel)

    def both(product: Callable, weights: tf.Tensor) -> Callable[[], object]:
        @tf.function(autograph=False)
        def run(x: tf.Tensor, weights: tf.Tensor) -> tuple:
            with tf.GradientTape() as tape:
                tape.watch((x, weights))
                y = product(x, weights)
            return y, tape.gradient(y, (x, weights))

        return lambda: run(x, weights)

    return {
        'dense_ours': both(networks.dense, kernel),
        'dense_tensorflow': both(tf.matmul, stock_kernel),
    }


def measure(repeats: int, operations: int) -> dict[str, list[float]]:
    """ms of each action, one number a repeat: of CPU for one operation at a time, else of wall."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(operations)
    clock = time.process_time if operations == 1 else time.perf_counter
    actions = _dense_actions()
    for agent in itertools.product(TORSOS, (False, True), PRECISIONS):
        actions |= _agent_actions(*agent)
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = clock()
            action()
            times[name].append(1e3 * (clock() - start))
    return times


def measure_both(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Median and least ms, without and with oneDNN, in processes taken in turn."""
    times: dict[str, dict[str, list[float]]] = {
        '0': defaultdict(list),
        '1': defaultdict(list),
    }
    for _ in range(options.rounds):
        for setting, collected in times.items():
            environment = {'TF_CPP_MIN_LOG_LEVEL': '3', **os.environ, _ONEDNN: setting}
            numbers = f'--repeats={options.repeats}', f'--operations={options.operations}'
            command = [sys.executable, '-m', _MODULE, *numbers, '--child']
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for name, values in json.loads(output.stdout).items():
                collected[name] += values
    return {
        f'{_ONEDNN}={setting}': {
            name: {'median': round(statistics.median(values), 2), 'least': round(min(values), 2)}
            for name, values in collected.items()
        }
        for setting, collected in times.items()
    }


def main() -> None:
    """Measures, or, as a child, measures under one setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=2, help='processes per setting')
    parser.add_argument('--repeats', type=int, default=25, help='measurements per process')
    parser.add_argument(
        '--operations',
        type=int,
        default=1,
        choices=range(1, 9),
        help="TensorFlow's operations at a time, each one thread",
    )
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.repeats, options.operations)))
        return
    result = measure_both(options)
    unit = 'CPU ms on one core' if options.operations == 1 else 'wall ms'
    print(json.dumps({'unit': unit, 'batch_size': _BATCH, **result}, indent=2))


if __name__ == '__main__':
    main()
