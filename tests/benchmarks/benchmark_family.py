"""What each member of the DQN family costs beside plain DQN, and what its arithmetic explains.

    taskset -c 0 python -m tests.benchmarks.benchmark_family

CPU ms on one core of a learner's gradient (Nature network, batch 32, six actions) and of an actor's
step of eight environments, medians of interleaved rounds; `expected` scales plain DQN's by the
multiplications of the networks' layers and of the head's loss. Prints JSON.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

# Before TensorFlow is loaded: as the workers have it.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import tensorflow as tf

from agents import dqn, py_environment
from agents.actor_priorities import InitialPriorities
from agents.config import AgentConfig, EnvironmentConfig, NetworkConfig
from agents.gradient import AgentGradient
from agents.heads import QuantileHead
from agents.model import Model, family_model
from agents.networks import TORSOS
from agents.policy import GreedyPolicy
from infra.replay.trajectory import Transition

_BATCH, _ENVIRONMENTS, _NUM_ACTIONS, _SIDE = 32, 8, 6, 84

MEMBERS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # name: the agent's values, the network's, whether it is prioritized
    'dqn': ({}, {}, False),
    'double': ({'double_dqn': True}, {}, False),
    'dueling': ({}, {'dueling': True}, False),
    'prioritized': ({}, {}, True),
    'munchausen': ({'munchausen': True}, {}, False),
    'c51': ({'agent': 'c51'}, {}, False),
    'qr_dqn': ({'agent': 'qr_dqn'}, {}, False),
    'iqn': ({'agent': 'iqn'}, {}, False),
    'apex': ({'double_dqn': True}, {'dueling': True}, True),
    'rainbow_lite': ({'agent': 'c51', 'double_dqn': True}, {'dueling': True}, True),
}


def build(agent_values: dict[str, Any], network_values: dict[str, Any]) -> Model:
    """A member of the family."""
    return family_model(
        dqn.make_agent(
            AgentConfig(**agent_values),
            NetworkConfig('nature', **network_values),
            py_environment.time_step_spec(EnvironmentConfig()),
            py_environment.action_spec(_NUM_ACTIONS),
        )
    )


def multiplications(model: Model, quantiles: int = 1) -> tuple[int, int]:
    """Of one row's forward pass, and of its first layer alone.

    Implicit quantiles repeat the dense layers.
    """
    side, layers = _SIDE, []
    strides = iter(TORSOS['nature'].convolutions)
    for variable in model.variables:
        if len(variable.shape) == 4:
            size, stride = variable.shape[0], next(strides)[2]
            side = (side - size) // stride + 1
            layers.append(side * side * math.prod(variable.shape))
        elif len(variable.shape) == 2:
            layers.append(quantiles * math.prod(variable.shape))
    return sum(layers), layers[0]


def implicit_head(model: Model) -> QuantileHead | None:
    """The head of implicit quantiles, None of other members."""
    head = model.head
    return head if isinstance(head, QuantileHead) and head.num_drawn else None


def acting_work(model: Model) -> int:
    """Multiplications of a row's values."""
    implicit = implicit_head(model)
    return multiplications(model, implicit.num_quantiles if implicit else 1)[0]


def gradient_work(model: Model, values: dict[str, Any]) -> float:
    """Multiplications of one row's gradient: forward, backward (twice that, but for the frames),
    target, the online network's choice or the target's bonus, and the comparison of every two
    quantiles."""
    implicit = implicit_head(model)
    forward, first = multiplications(model, implicit.num_drawn if implicit else 1)
    twice = 'double_dqn' in values or 'munchausen' in values
    work: float = forward + (2 * forward - first) + forward * (2 if twice else 1)
    if implicit is not None:  # pairs, and the choice
        work += 4 * implicit.num_drawn**2 + acting_work(model)
    elif isinstance(model.head, QuantileHead):
        work += 4 * model.head.num_quantiles**2
    return work


def learner_action(model: Model, prioritized: bool) -> Callable[[], object]:
    """One gradient of a random batch."""
    frames = np.random.default_rng(0).integers(256, size=(_BATCH, 84, 84, 4), dtype=np.uint8)
    ones = np.ones(_BATCH, np.float32)
    batch = Transition(frames, np.zeros(_BATCH, np.int32), ones, ones, frames)
    gradient = AgentGradient(model, gradient_clip_norm=10.0, weighted=prioritized)
    weights = ones if prioritized else None
    return lambda: gradient.gradient(batch, weights)


def actor_action(model: Model, prioritized: bool) -> Callable[[], object]:
    """One choice of actions, with the errors of what it completes."""
    rng = np.random.default_rng(0)
    observation = rng.integers(256, size=(_ENVIRONMENTS, 84, 84, 4), dtype=np.uint8)
    policy = GreedyPolicy(model)
    if not prioritized or model.head is None:
        return lambda: policy.act(observation)
    priorities = InitialPriorities(model.head, n_step=3, gamma=0.99)
    ones = np.ones(_ENVIRONMENTS, np.float32)

    def act() -> None:
        action, outputs = policy.evaluate(observation)
        priorities.completed(outputs, action)
        priorities.began(outputs, action, ones, ones)

    return act


def measure(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU ms of each action, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(5):  # tracing, and the first transition's steps
            action()
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.process_time()
            action()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--repeats', type=int, default=60, help='measurements of each')
    repeats = parser.parse_args().repeats
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    models = {name: build(values, network) for name, (values, network, _) in MEMBERS.items()}
    learners = {name: learner_action(model, MEMBERS[name][2]) for name, model in models.items()}
    actors = {name: actor_action(model, MEMBERS[name][2]) for name, model in models.items()}
    gradients, steps = measure(learners, repeats), measure(actors, repeats)
    work = {name: gradient_work(model, MEMBERS[name][0]) for name, model in models.items()}
    forward = {name: acting_work(model) for name, model in models.items()}
    table = {
        name: {
            'gradient_ms': round(gradients[name], 2),
            'gradient_expected_ms': round(gradients['dqn'] * work[name] / work['dqn'], 2),
            'act_ms': round(steps[name], 2),
            'act_expected_ms': round(steps['dqn'] * forward[name] / forward['dqn'], 2),
        }
        for name in MEMBERS
    }
    print(json.dumps({'unit': 'CPU ms on one core', 'batch_size': _BATCH, **table}, indent=2))


if __name__ == '__main__':
    main()
