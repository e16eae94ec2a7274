"""The cost of evaluations during training: a run's rates with and without them; prints JSON.

    python -m tests.benchmarks.benchmark_evaluator --pairs 3 --seconds 300

Each pair is two runs, without and with the evaluator, in an order that alternates. The evaluator
starts before a run is observed, so that its start is paid off within the observation.
"""

import argparse
import json
import shlex
import statistics

import psutil

from pipelines.experiment import command_line
from tests.benchmarks.benchmark_run import observe

_OFF = ('--evaluator_cpu_share=0',)
_BEFORE_OBSERVATION = '--evaluation_period_updates=100'  # which begins at update 200


def rates(flags: list[str], seconds: float) -> dict[str, float]:
    """A run's updates/s and the evaluator's CPU time as a share of all cores."""
    _, preset, values = command_line.parse(flags)
    seen = observe(flags, command_line.experiment(preset, values), seconds)
    cores = len(psutil.Process().cpu_affinity())
    return {
        'updates_per_second': seen['updates'] / seen['wall_seconds'],
        'agent_steps_per_second': seen['agent_steps'] / seen['wall_seconds'],
        'evaluator_cpu_share': seen['cpu_seconds'].get('evaluator', 0.0)
        / (cores * seen['wall_seconds']),
    }


def main() -> None:
    """Prints the rates of each run, and the ratio of their medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--flags', default='', help='flags of the runs')
    parser.add_argument('--cpu_share', type=float, default=0.03, help='with the evaluator')
    parser.add_argument('--seconds', type=float, default=300.0, help='how long to observe each')
    parser.add_argument('--pairs', type=int, default=3, help='runs with and without')
    arguments = parser.parse_args()
    flags = shlex.split(arguments.flags)
    on = (f'--evaluator_cpu_share={arguments.cpu_share}', _BEFORE_OBSERVATION)
    found: dict[str, list[dict[str, float]]] = {'off': [], 'on': []}
    for pair in range(arguments.pairs):
        for name in ('off', 'on') if pair % 2 == 0 else ('on', 'off'):
            more = _OFF if name == 'off' else on
            found[name].append(rates([*flags, *more], arguments.seconds))
    off_rate, on_rate = (
        statistics.median(run['updates_per_second'] for run in found[name])
        for name in ('off', 'on')
    )
    print(json.dumps({**found, 'updates_per_second_on_to_off': on_rate / off_rate}, indent=2))


if __name__ == '__main__':
    main()
