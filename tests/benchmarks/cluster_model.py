"""A cluster, event by event: costs and a topology in, rates, loads and staleness out; prints JSON.

    python -m tests.benchmarks.benchmark_parameter_server --parameters 677686 --shards 1 31 > m.json
    python -m tests.benchmarks.benchmark_run \\
        --flags="--preset laptop --precision float32 --torso dqn2013 --screen_size 84" > r.json
    python -m tests.benchmarks.cluster_model --messages m.json --run r.json --actors 100 \\
        --learners 100 --shards 31
    python -m tests.benchmarks.cluster_model --messages m.json --check

Each actor, learner, shard of the parameter server and replay shard has a core, so its CPU time is
its duration. Learners sample, compute, push and pull as theirs do; actors play and pull; the replay
holds both to the ratio of the preset. What is not modelled: failures, stragglers, the time that
messages take on the way through switches. `--check` compares the model of one host, whose cores all
share, with `benchmark_load` at small topologies; a ratio is the model's figure over the measured
one.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import statistics
from collections.abc import Generator, Mapping
from typing import Any

import simpy

from tests.benchmarks import benchmark_load

_SLICE_MS = 4.0  # a turn of the kernel's scheduler
_WARM_UP_MS = 3_000.0
_ENVIRONMENTS = 8  # of an actor, as in the preset `laptop`
_PULL_PERIOD = 16  # an actor's steps of all its environments between two pulls
_STEPS_PER_UPDATE = 4.0
_TOLERANCE_STEPS = 1_000.0  # by which actors or learners may be ahead
_CHECKED: tuple[dict[str, Any], ...] = (
    {'learners': 1, 'shards': 1, 'gradient_ms': 20.0},
    {'learners': 4, 'shards': 1, 'gradient_ms': 40.0},
    {'learners': 8, 'shards': 1, 'gradient_ms': 20.0},
    {'learners': 16, 'shards': 1, 'gradient_ms': 100.0},
    {'learners': 4, 'shards': 4, 'gradient_ms': 50.0},
    {'learners': 4, 'shards': 31, 'gradient_ms': 200.0},
)

Steps = Generator[simpy.Event, Any, Any]
"""What a process of the model waits for, in turn."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """CPU milliseconds, and the size of the network.

    Attributes:
      parameters: of the network, four bytes each.
      client_message: of a push and pull at one shard, at the learner, whatever its size.
      client_vector: of all parameters of a push and pull, at the learner.
      shard_message: the same at a shard.
      shard_vector: the same at all shards together, the optimizer included.
      apply: of the optimizer for all parameters, which a pull alone does not need.
      learner: of an update at the learner, in a run whose pushes use shared memory.
      actor: of an agent step at the actor.
      replay: of a batch at the replay, with the inserts due to it.
    """

    parameters: int
    client_message: float
    client_vector: float
    shard_message: float
    shard_vector: float
    apply: float
    learner: float = 0.0
    actor: float = 0.0
    replay: float = 0.0


def costs_from(messages: Mapping[str, Any], run: Mapping[str, Any] | None) -> Costs:
    """Reads costs from what benchmark_parameter_server and benchmark_run print.

    The message's own cost is the slope from the fewest to the most shards.
    """
    found = {int(shards): ways['float32'] for shards, ways in messages['push_pull'].items()}
    few, many = min(found), max(found)
    fixed = {
        side: (found[many][f'{side}_cpu_ms'] - found[few][f'{side}_cpu_ms']) / (many - few)
        for side in ('client', 'server')
    }
    vector = {side: found[few][f'{side}_cpu_ms'] - few * fixed[side] for side in fixed}
    spent = {} if run is None else run['cpu_seconds']
    return Costs(
        parameters=messages['parameters'],
        client_message=fixed['client'],
        client_vector=vector['client'],
        shard_message=fixed['server'],
        shard_vector=vector['server'],
        apply=messages['apply']['adam']['cpu_ms'],
        learner=1e3 * spent['learner'] / run['updates'] if run else 0.0,
        actor=1e3 * spent['actor'] / run['agent_steps'] if run else 0.0,
        replay=1e3 * spent['replay'] / run['updates'] if run else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Topology:
    """What runs where.

    Attributes:
      actors, learners, shards, replays: their numbers.
      host_cores: cores that all share; 0: each has one to itself.
      round_trip_ms: between any two hosts.
      gigabits: a second, of each shard's link in each direction; 0: the link takes no time.
      gradient_ms: mean time that a learner waits in place of an update's work; 0: it works.
    """

    actors: int
    learners: int
    shards: int
    replays: int = 1
    host_cores: int = 0
    round_trip_ms: float = 0.0
    gigabits: float = 0.0
    gradient_ms: float = 0.0


class Host:
    """Cores, which tasks take in slices; sums the time that they work."""

    def __init__(self, env: simpy.Environment, cores: int):
        self._env, self.cores = env, cores
        self._free = simpy.Resource(env, cores)
        self.busy_ms = 0.0

    def work(self, cpu_ms: float) -> Steps:
        """Takes `cpu_ms` of a core, in turn with others."""
        while cpu_ms > 0:
            part = min(cpu_ms, _SLICE_MS)
            with self._free.request() as turn:
                yield turn
                yield self._env.timeout(part)
            self.busy_ms += part
            cpu_ms -= part


class Shard:
    """A shard of the parameter server: one message at a time, each way over its own link."""

    def __init__(self, env: simpy.Environment, host: Host, topology: Topology, costs: Costs):
        self._env, self.host, self._topology, self._costs = env, host, topology, costs
        self._turn, self._in, self._out = (simpy.Resource(env) for _ in range(3))
        self.version = 0
        self.staleness: list[int] = []

    def answer(self, version: int | None) -> Steps:
        """Applies a gradient of `version`, None: a pull alone; returns the version sent back."""
        costs, shards = self._costs, self._topology.shards
        yield self._env.timeout(self._topology.round_trip_ms / 2)
        if version is not None:
            yield from self._sent(self._in)
        with self._turn.request() as turn:
            yield turn
            unapplied = costs.apply if version is None else 0.0
            yield from self.host.work(
                costs.shard_message + (costs.shard_vector - unapplied) / shards
            )
            if version is not None:
                self.staleness.append(self.version - version)
                self.version += 1
            newest = self.version
        yield from self._sent(self._out)
        yield self._env.timeout(self._topology.round_trip_ms / 2)
        return newest

    def _sent(self, link: simpy.Resource) -> Steps:
        if self._topology.gigabits:
            bits = 32.0 * self._costs.parameters / self._topology.shards
            with link.request() as turn:
                yield turn
                yield self._env.timeout(1e3 * bits / (1e9 * self._topology.gigabits))


class Cluster:
    """The processes of a topology."""

    def __init__(self, topology: Topology, costs: Costs, seed: int = 0):
        self.env, self._random = simpy.Environment(), random.Random(seed)
        self._topology, self._costs = topology, costs
        shared = Host(self.env, topology.host_cores) if topology.host_cores else None
        self.hosts = {
            kind: [shared or Host(self.env, 1) for _ in range(count)]
            for kind, count in (
                ('actor', topology.actors),
                ('learner', topology.learners),
                ('parameter_shard', topology.shards),
                ('replay_shard', topology.replays),
            )
        }
        self.shards = [
            Shard(self.env, host, topology, costs) for host in self.hosts['parameter_shard']
        ]
        # Steps that actors have made and updates not used: 0, learners wait; full, actors wait.
        self._steps = simpy.Container(self.env, 2 * _TOLERANCE_STEPS, _TOLERANCE_STEPS)
        self.agent_steps = 0
        for index, host in enumerate(self.hosts['learner']):
            self.env.process(self._learn(host, index))
        for host in self.hosts['actor']:
            self.env.process(self._act(host))

    def _learn(self, host: Host, index: int) -> Steps:
        topology, costs = self._topology, self._costs
        yield self.env.timeout(self._random.uniform(0, costs.learner + topology.gradient_ms))
        if topology.gradient_ms:
            yield from self._wait_and_push(host)
        replay = self.hosts['replay_shard'][index % topology.replays]
        version = newest = 0
        batch, push = self.env.process(self._sample(replay)), None
        while True:
            yield batch
            batch = self.env.process(self._sample(replay))  # beside the gradient, as the push
            yield from host.work(costs.learner)
            if push is not None:
                newest = yield push
            push = self.env.process(self._push(host, version))
            version = newest

    def _wait_and_push(self, host: Host) -> Steps:
        """A learner of `benchmark_load`."""
        version = 0
        while True:
            yield self.env.timeout(self._topology.gradient_ms * self._random.uniform(0.5, 1.5))
            version = yield self.env.process(self._push(host, version))

    def _sample(self, replay: Host) -> Steps:
        yield self._steps.get(_STEPS_PER_UPDATE)
        yield from replay.work(self._costs.replay)

    def _push(self, host: Host, version: int) -> Steps:
        costs = self._costs
        yield from host.work(costs.client_message * len(self.shards) + costs.client_vector)
        answers = [self.env.process(shard.answer(version)) for shard in self.shards]
        yield self.env.all_of(answers)
        return answers[0].value

    def _act(self, host: Host) -> Steps:
        yield self.env.timeout(self._random.uniform(0, _ENVIRONMENTS * self._costs.actor))
        while True:
            for _ in range(_PULL_PERIOD):
                yield from host.work(_ENVIRONMENTS * self._costs.actor)
                yield self._steps.put(_ENVIRONMENTS)
                self.agent_steps += _ENVIRONMENTS
            yield self.env.all_of([self.env.process(shard.answer(None)) for shard in self.shards])

    def observe(self, seconds: float) -> dict[str, Any]:
        """Rates, staleness at the first shard, and each kind's share of its cores in use."""
        self.env.run(_WARM_UP_MS)
        for shard in self.shards:
            shard.staleness.clear()
        before = self.agent_steps
        busy = {kind: sum(host.busy_ms for host in hosts) for kind, hosts in self.hosts.items()}
        self.env.run(_WARM_UP_MS + 1e3 * seconds)
        staleness = self.shards[0].staleness
        loads = {
            kind: (sum(host.busy_ms for host in hosts) - busy[kind])
            / (1e3 * seconds * sum(host.cores for host in hosts))
            for kind, hosts in self.hosts.items()
            if hosts
        }
        return {
            'updates_per_second': len(staleness) / seconds,
            'agent_steps_per_second': (self.agent_steps - before) / seconds,
            'staleness_median': statistics.median(staleness) if staleness else None,
            'loads': {kind: round(load, 3) for kind, load in loads.items()},
            'bottleneck': max(loads, key=lambda kind: loads[kind]),
        }


def checked(costs: Costs, cores: int, seconds: float) -> list[dict[str, Any]]:
    """The model beside `benchmark_load`, at each of `_CHECKED`."""
    rows = []
    for case in _CHECKED:
        options = argparse.Namespace(
            actors=0,
            learners=case['learners'],
            parameter_shards=case['shards'],
            gradient_ms=case['gradient_ms'],
            actor_steps_per_second=60.0,
            max_staleness=1000,
            wire='float32',
            shared_memory=False,
            processes=min(4, case['learners']),
            seconds=seconds,
        )
        measured = benchmark_load.measure(options)
        topology = Topology(actors=0, host_cores=cores, **case)
        modelled = Cluster(topology, costs).observe(seconds)
        rate, stale = measured['updates_per_second'], measured['staleness']['p50']
        rows.append(
            {
                **case,
                'measured': {'updates_per_second': rate, 'staleness_median': stale},
                'modelled': modelled,
                'ratio': round(modelled['updates_per_second'] / rate, 3),
            }
        )
    return rows


def main() -> None:
    """Models one topology, or checks the model, and prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    json_file = {'type': pathlib.Path, 'help': "JSON of the benchmark of that name's figures"}
    parser.add_argument('--messages', required=True, **json_file)  # type: ignore[arg-type]
    parser.add_argument('--run', **json_file)  # type: ignore[arg-type]
    parser.add_argument('--check', action='store_true', help='compare with benchmark_load')
    parser.add_argument('--actors', type=int, default=100)
    parser.add_argument('--learners', type=int, default=100)
    parser.add_argument('--shards', type=int, default=31, help='of the parameter server')
    parser.add_argument('--replays', type=int, default=1, help='replay shards')
    parser.add_argument('--round_trip_ms', type=float, default=0.5)
    parser.add_argument('--gigabits', type=float, default=10.0, help='a second, of a shard')
    parser.add_argument('--seconds', type=float, default=10.0, help='to observe')
    options = parser.parse_args()
    if not options.check and options.run is None:
        parser.error('--run is missing. Fix: pass the JSON that benchmark_run prints, or --check.')
    run = None if options.run is None else json.loads(options.run.read_text())
    costs = costs_from(json.loads(options.messages.read_text()), run)
    if options.check:
        found: Any = {'check': checked(costs, len(os.sched_getaffinity(0)), options.seconds)}
    else:
        names = ('actors', 'learners', 'shards', 'replays', 'round_trip_ms', 'gigabits')
        topology = Topology(**{name: getattr(options, name) for name in names})
        found = {'topology': dataclasses.asdict(topology)}
        found |= Cluster(topology, costs).observe(options.seconds)
    print(json.dumps({'costs': dataclasses.asdict(costs), **found}, indent=2))


if __name__ == '__main__':
    main()
