"""The whole: a real run's rates, each process's CPU time, and its efficiency; prints JSON.

    python -m tests.benchmarks.benchmark_run                      # plain DQN, two learners
    python -m tests.benchmarks.benchmark_run --flags="--preset laptop"

Efficiency is the CPU time nobody here can avoid (gradient, environment, inference, apply; each
measured alone, on one core, in this process) over the CPU time spent, and over wall time x cores.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator

# Before TensorFlow is loaded: oneDNN as learners have it, and one thread, to measure one core.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
os.environ.setdefault('TF_NUM_INTEROP_THREADS', '1')

import numpy as np
import psutil

from agents import py_environment
from agents.environments.atari import AtariEnvironment
from infra.parameter_server.client import ParameterClient
from infra.replay.trajectory import Transition
from pipelines.experiment import builders, command_line
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig

# Mnih et al. 2015 with two learners: what CleanRL's dqn_atari computes.
PLAIN_DQN = (
    '--preset=nature --num_learners=2 --overlap_push --envs_per_actor=8 --min_replay_size=2000'
)
_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_ROOT = pathlib.Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def running(flags: list[str]) -> Iterator[pathlib.Path]:
    """A run of the main job; yields its directory; stopped at once afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = pathlib.Path(scratch) / 'run'
        process = subprocess.Popen(
            [sys.executable, 'pipelines/run.py', f'--run_dir={run_dir}', *flags],
            cwd=_ROOT,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield run_dir
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def connect(run_dir: pathlib.Path, experiment: ExperimentConfig) -> ParameterClient:
    """A client of the run's parameter shards, once they serve."""
    shards = experiment.parameter_server.num_parameter_shards
    files = [run_dir / 'servers' / f'parameter_server_{shard}.ready' for shard in range(shards)]
    deadline = time.monotonic() + _START_SECONDS
    while not all(file.exists() for file in files):
        if time.monotonic() > deadline:
            raise TimeoutError(f'the parameter shards did not serve in {_START_SECONDS:g} s')
        time.sleep(0.5)
    addresses = [f'127.0.0.1:{json.loads(file.read_text())["port"]}' for file in files]
    return ParameterClient(addresses, builders.layout_of(builders.build_policy(experiment)))


def component(process: psutil.Process) -> str:
    """Which box a process is."""
    command = ' '.join(process.cmdline())
    for name in ('parameter_server', 'replay'):
        if f'infra.{name}.server' in command:
            return name
    if 'pipelines.evaluator' in command:
        return 'evaluator'
    if 'pipelines.job' in command:
        return 'beam_job'
    for ancestor in process.parents():  # Beam puts a shell between a job and its workers
        for flag in ancestor.cmdline():
            if flag.startswith(('--actors=', '--learners=', '--bundles=')):
                return flag[2:].partition('s=')[0]
    return 'launcher'


def cpu_by_component() -> Counter[str]:
    """CPU seconds so far of every process below this one, by box."""
    seconds: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds[component(process)] += times.user + times.system
    return seconds


def observe(flags: list[str], experiment: ExperimentConfig, seconds: float) -> dict:
    """Rates and CPU times of a run over `seconds`, from its 200th update on."""
    with running(flags) as run_dir, connect(run_dir, experiment) as client:
        deadline = time.monotonic() + _START_SECONDS
        while client.report()['shards'][0]['version'] < 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f'the run made no 200 updates in {_START_SECONDS:g} s')
            time.sleep(1.0)
        before, cpu_before, start = client.report()['shards'][0], cpu_by_component(), time.time()
        time.sleep(seconds)
        after, cpu_after, wall = client.report()['shards'][0], cpu_by_component(), time.time()
        wall -= start
    cpu_after.subtract(cpu_before)
    return {
        'wall_seconds': wall,
        'updates': after['version'] - before['version'],
        'agent_steps': after['agent_steps'] - before['agent_steps'],
        'cpu_seconds': {name: round(value, 2) for name, value in sorted(cpu_after.items())},
    }


def cpu_ms(action: Callable[[], object], repeats: int) -> float:
    """Median CPU milliseconds of `action` in this process."""
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(1e3 * (time.process_time() - start))
    return float(np.median(times))


def unavoidable(experiment: ExperimentConfig, repeats: int) -> dict[str, float]:
    """CPU milliseconds of each box's own arithmetic, alone: per update, and per agent step."""
    import tensorflow as tf

    from infra.parameter_server.optimizers import OptimizedSlice

    rng = np.random.default_rng(0)
    learner = builders.build_learner(experiment)
    policy = builders.build_policy(experiment)
    batch, envs = experiment.learner.batch_size, experiment.actor.envs_per_actor
    shape = py_environment.observation_spec(experiment.environment).shape
    frames = tf.constant(rng.integers(256, size=(batch, *shape), dtype=np.uint8))
    zeros = tf.zeros(batch)
    transition = Transition(frames, tf.zeros(batch, tf.int32), zeros, zeros, frames)
    weights = [np.ones(batch, np.float32)] if experiment.replay.prioritized else []
    whole = OptimizedSlice(experiment.parameter_server, len(learner.parameters()))
    gradient = tf.constant(rng.normal(size=len(learner.parameters())), tf.float32)
    observation = rng.integers(256, size=(envs, *shape), dtype=np.uint8)
    with AtariEnvironment(experiment.environment, envs, seed=1) as environment:
        environment.reset()
        action = np.zeros(envs, np.int32)
        # The emulators have threads of their own, which the process's clock counts too.
        environment_ms = cpu_ms(lambda: environment.step_frames(action), 10 * repeats)
    return {
        'gradient_per_update': cpu_ms(lambda: learner.gradient(transition, *weights), repeats),
        'apply_per_update': cpu_ms(lambda: whole.step(gradient, update=1), repeats),
        'environment_per_step': environment_ms / envs,
        'inference_per_step': cpu_ms(lambda: policy.act(observation), repeats) / envs,
    }


def main() -> None:
    """Prints the measurements of one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--flags', default=PLAIN_DQN, help='flags of the run')
    parser.add_argument('--seconds', type=float, default=60.0, help='how long to observe it')
    parser.add_argument('--repeats', type=int, default=50, help='measurements of each box alone')
    arguments = parser.parse_args()
    flags = shlex.split(arguments.flags)
    launch, preset, values = command_line.parse(flags)
    experiment = launch.started(command_line.experiment(preset, values))
    costs = unavoidable(experiment, arguments.repeats)
    seen = observe(flags, experiment, arguments.seconds)
    needed = 1e-3 * (
        seen['updates'] * (costs['gradient_per_update'] + costs['apply_per_update'])
        + seen['agent_steps'] * (costs['environment_per_step'] + costs['inference_per_step'])
    )
    cores = len(psutil.Process().cpu_affinity())
    spent = sum(seen['cpu_seconds'].values())
    result = {
        'flags': arguments.flags,
        'experiment': config_lib.to_json(experiment) if preset is None else preset,
        **seen,
        'updates_per_second': seen['updates'] / seen['wall_seconds'],
        'agent_steps_per_second': seen['agent_steps'] / seen['wall_seconds'],
        'unavoidable_cpu_ms': costs,
        'unavoidable_cpu_seconds': needed,
        'efficiency_of_cpu': needed / spent,
        'efficiency_of_wall_x_cores': needed / (seen['wall_seconds'] * cores),
        'cores': cores,
        'parameters': len(builders.build_policy(experiment).parameters()),
        'actor_pulls_per_step': 1.0
        / (experiment.actor.actor_pull_period * experiment.actor.envs_per_actor),
    }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
