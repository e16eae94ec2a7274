"""Sizes a run for a target rate: `.venv/bin/python pipelines/plan.py --target_fps 20000`.

In: the target, and each component's CPU time per agent step and per update as measured by
tests/benchmarks/benchmark_run.py. Out: actors, learners, shards, cores, network load and price.

Assumes that cost is proportional to rate. Ignores learners that wait for a distant parameter
server (docs/performance.md) and staleness that grows with the number of learners.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.flags import Parser, integer, positive_number
from infra.parameter_server.config import ParameterServerConfig
from infra.sealed import parse_object
from pipelines.errors import UsageError, one_line_errors, reason_of

COSTS = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'costs_laptop.json'
"""Measured with `benchmark_run --flags="--preset laptop --min_replay_size=2000"` (2026-11-24), the
first values of the preset (docs/results.md)."""

_LEAST, _MOST = 1e-6, 1e12  # values of flags

UTILISATION = 0.8
"""Planned load of a core or a network; the rest absorbs peaks, checkpoints and restarts."""

MEASURED_UPDATES_PER_SECOND = 106.6
"""Highest rate measured with these servers (docs/performance.md)."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured costs.

    Attributes:
      actor_ms, replay_ms: CPU milliseconds per agent step; replay_ms includes sampling at the
        measured ratio of steps to updates.
      learner_ms, parameter_server_ms: CPU milliseconds per update.
      parameters: number of network parameters.
      pulls_per_step: parameter pulls of actors per agent step.
    """

    actor_ms: float
    replay_ms: float
    learner_ms: float
    parameter_server_ms: float
    parameters: int
    pulls_per_step: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Resources for a target.

    Attributes:
      agent_steps_per_second, updates_per_second: the target.
      actors, learners, parameter_shards, replay_shards: processes, each counted as one core.
      cores: cores that all of them need at `UTILISATION`.
      parameter_gbit_per_second: traffic of parameters and gradients if each process has its own
        host.
    """

    agent_steps_per_second: float
    updates_per_second: float
    actors: int
    learners: int
    parameter_shards: int
    replay_shards: int
    cores: int
    parameter_gbit_per_second: float


def read_costs(path: pathlib.Path) -> Costs:
    """Reads the JSON that benchmark_run.py prints.

    Raises:
      UsageError: the file is not readable or not such JSON.
    """
    try:
        measured = parse_object(path.read_bytes())
        cpu, steps = measured['cpu_seconds'], measured['agent_steps']
        return Costs(
            actor_ms=1e3 * cpu['actor'] / steps,
            replay_ms=1e3 * cpu['replay'] / steps,
            learner_ms=1e3 * cpu['learner'] / measured['updates'],
            parameter_server_ms=1e3 * cpu['parameter_server'] / measured['updates'],
            parameters=int(measured['parameters']),
            pulls_per_step=float(measured['actor_pulls_per_step']),
        )
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UsageError(
            f'--costs {path}: no valid costs ({type(error).__name__}: {reason_of(error)}).'
            ' Fix: name a file with the JSON that tests/benchmarks/benchmark_run.py prints.'
        ) from error


def plan(costs: Costs, agent_steps_per_second: float, steps_per_update: float) -> Plan:
    """Computes the processes and cores for a target."""
    updates = agent_steps_per_second / steps_per_update
    cores = {
        'actors': agent_steps_per_second * costs.actor_ms / 1e3 / UTILISATION,
        'learners': updates * costs.learner_ms / 1e3 / UTILISATION,
        'parameter_shards': updates * costs.parameter_server_ms / 1e3 / UTILISATION,
        'replay_shards': agent_steps_per_second * costs.replay_ms / 1e3 / UTILISATION,
    }
    counts = {name: max(1, math.ceil(busy)) for name, busy in cores.items()}
    # A replay shard without an actor would stay empty.
    counts['actors'] = max(counts['actors'], counts['replay_shards'])
    # An update transfers a gradient and parameters, an actor's pull only parameters.
    vectors = 2 * updates + agent_steps_per_second * costs.pulls_per_step
    return Plan(
        agent_steps_per_second,
        updates,
        **counts,
        cores=math.ceil(sum(cores.values())),
        parameter_gbit_per_second=vectors * costs.parameters * 32 / 1e9,
    )


def warnings(found: Plan, machine_cores: int, machine_gbit_per_second: float) -> list[str]:
    """Problems of a plan, one line each."""
    lines = []
    usable = machine_gbit_per_second * UTILISATION
    if found.cores > machine_cores and found.parameter_gbit_per_second > usable:
        machines = math.ceil(found.parameter_gbit_per_second / usable)
        lines.append(
            f'network: parameters and gradients need {found.parameter_gbit_per_second:.3g} Gbit/s'
            f' (a machine has {machine_gbit_per_second:g}). Fix: spread at least {machines}'
            f' parameter shards over {machines} machines, send less with --wire'
            ' (docs/performance.md), or make fewer updates of larger batches.'
        )
    bound = ParameterServerConfig().max_staleness
    if found.learners > bound:
        lines.append(
            f'staleness: gradients are about {found.learners} updates old, one per learner, which'
            f' exceeds the default --max_staleness {bound}. Fix: raise it, or make fewer updates of'
            ' larger batches.'
        )
    if found.updates_per_second > MEASURED_UPDATES_PER_SECOND:
        lines.append(
            f'rate: {found.updates_per_second:.6g} updates/s is an extrapolation (highest measured:'
            f' {MEASURED_UPDATES_PER_SECOND}). Fix: try a smaller target with benchmark_load first.'
        )
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog='plan.py', description='Computes actors, learners, shards and machines for a target.'
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--target_fps', type=float, help='Emulator frames per second.')
    target.add_argument('--target_ups', type=float, help='Updates per second.')
    parser.add_argument(
        '--agent_steps_per_update',
        type=float,
        default=4.0,
        help='Agent steps of all actors for each update of the run. Default: 4.',
    )
    parser.add_argument(
        '--action_repeat', type=integer, default=4, help='Frames per agent step. Default: 4.'
    )
    parser.add_argument(
        '--costs',
        type=pathlib.Path,
        default=COSTS,
        help='JSON file with the costs of an agent step and an update on your machines, printed by'
        ' tests/benchmarks/benchmark_run.py. Default: docs/costs_laptop.json, of two cores and the'
        ' first values of laptop.',
    )
    parser.add_argument(
        '--machine_cores', type=integer, default=4, help='Cores per machine. Default: 4.'
    )
    parser.add_argument(
        '--machine_gbit_per_second',
        type=positive_number,
        default=10.0,
        help='Network bandwidth of a machine in Gbit/s. Default: 10.',
    )
    parser.add_argument(
        '--price_per_hour',
        type=float,
        help='Price of a machine per hour, in any currency. Default: no price is printed.',
    )
    return parser.parse_args(argv)


def _steps_per_second(arguments: argparse.Namespace) -> float:
    """Converts the target to agent steps per second.

    Raises:
      UsageError: a value is out of range.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, float | int) and not _LEAST <= value <= _MOST:
            raise UsageError(
                f'--{name} {value:g}: must be from {_LEAST:g} to {_MOST:g}. Fix: correct the value.'
            )
    if arguments.target_fps is not None:
        return arguments.target_fps / arguments.action_repeat
    return arguments.target_ups * arguments.agent_steps_per_update


def describe(
    found: Plan, costs: Costs, machine_cores: int, price_per_hour: float | None
) -> Mapping[str, Any]:
    """The plan, its costs and the machines, for JSON."""
    machines = math.ceil(found.cores / machine_cores)
    result: dict[str, Any] = {**dataclasses.asdict(found), 'machines': machines}
    if price_per_hour is not None:
        result['price_per_hour'] = machines * price_per_hour
    flags = f'--num_actors={found.actors} --num_learners={found.learners}'
    flags += f' --num_parameter_shards={found.parameter_shards}'
    result['flags'] = f'{flags} --num_replay_shards={found.replay_shards}'
    return {**result, 'costs': dataclasses.asdict(costs)}


@one_line_errors('plan.py')
def main(argv: Sequence[str]) -> int:
    """Prints a plan as JSON; returns the exit code."""
    arguments = parse(argv)
    costs = read_costs(arguments.costs)
    found = plan(costs, _steps_per_second(arguments), arguments.agent_steps_per_update)
    for line in warnings(found, arguments.machine_cores, arguments.machine_gbit_per_second):
        print(f'plan.py: {line}', file=sys.stderr)
    result = describe(found, costs, arguments.machine_cores, arguments.price_per_hour)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
