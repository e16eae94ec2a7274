"""A slow simulator, 50 ms a step: agent steps/s by engine and number of actors; prints JSON.

    python -m tests.benchmarks.benchmark_simulator --engines DirectRunner,DaskRunner --actors 1,4,16

Each run is observed from the time at which every actor has ended an episode and the learner has
begun. `linear` is its rate over that of the first run on this engine, per actor (goal: 0.9). `fed`
is its updates over those due by --agent_steps_per_update (goal: 1). `replay_lag` is where sampling
stands between the bounds of that ratio: at 0 the learner waits for actors, at 1 actors wait for the
learner. `cores` are CPU seconds of all processes over wall time.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence

import psutil
import reverb

from infra.parameter_server import health
from infra.replay.config import EXPERIENCE_TABLE
from pipelines.experiment import command_line
from pipelines.monitoring.episodes import read_episodes
from tests.benchmarks.benchmark_run import cpu_by_component, running
from tests.support import engines
from tests.support.waiting import eventually

_FLAGS = (
    '--environment=tests.support.environments:slow',
    '--envs_per_actor=1',
    '--n_step=1',  # longer windows reach over cuts of its short episodes: fewer transitions
    '--batch_size=32',
    '--dense_layers=64,64',
    '--min_replay_size=200',
    '--sample_insert_tolerance=100',  # the ratio holds within seconds
    '--max_steps=10000000',
    '--evaluator_cpu_share=0',
    '--no-video',
)
_FIRST_UPDATES = 50
_START_SECONDS = 600.0  # sixteen processes on two cores


@contextlib.contextmanager
def engine_flags(engine: str, workers: int, scratch: pathlib.Path) -> Iterator[list[str]]:
    """Flags that choose an engine, with a cluster of so many slots if it needs one."""
    with contextlib.ExitStack() as stack:
        extra = []
        if engine == 'DaskRunner':
            address = stack.enter_context(engines.dask_cluster(scratch, workers))
            extra = [f'--dask_client_address={address}']
        if engine == 'PrismRunner':
            extra = [f'--prism_location={engines.prism()}']
        yield [f'--runner={engine}', *extra]


def address_of(run_dir: pathlib.Path, server: str) -> str:
    """Address of a server of the run, such as 'replay_0'."""
    port = json.loads((run_dir / 'servers' / f'{server}.ready').read_text())['port']
    return f'127.0.0.1:{port}'


def counters(run_dir: pathlib.Path) -> dict[str, int]:
    """Agent steps and updates of a run so far."""
    report = health.ask(address_of(run_dir, 'parameter_server_0'), timeout_seconds=10.0)
    return {'agent_steps': report['agent_steps'], 'updates': report['version']}


def replay_lag(run_dir: pathlib.Path) -> float:
    """Where sampling stands between its bounds: 0 at its greatest lead, 1 at its greatest lag."""
    info = reverb.Client(address_of(run_dir, 'replay_0')).server_info(timeout=10)
    limiter = info[EXPERIENCE_TABLE].rate_limiter_info
    due = limiter.samples_per_insert * limiter.insert_stats.completed
    lag = due - limiter.sample_stats.completed
    return (lag - limiter.min_diff) / (limiter.max_diff - limiter.min_diff)


def runs() -> bool:
    """Whether the main job that this process has started is running."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            if 'pipelines/run.py' in process.cmdline():
                return True
    return False


def wait_until_steady(run_dir: pathlib.Path, actors: int) -> None:
    """Waits for an episode of every actor and the first updates.

    Raises:
      RuntimeError: they do not come, or the run has ended.
    """

    def steady() -> bool:
        time.sleep(1.0)
        if not runs():
            raise RuntimeError(f'{run_dir}: the run has ended, see above')
        playing = {episode.worker for episode in read_episodes(run_dir / 'episodes.jsonl')}
        return len(playing) == actors and counters(run_dir)['updates'] >= _FIRST_UPDATES

    if not eventually(steady, _START_SECONDS):
        raise RuntimeError(f'{run_dir}: not every actor and learner works after {_START_SECONDS} s')


def observe(engine: str, actors: int, flags: Sequence[str], seconds: float) -> dict:
    """Rates and CPU time of a run in its steady state."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        engine_flags(engine, actors + 1, pathlib.Path(scratch)) as chosen,
    ):
        start = time.monotonic()
        with running([*flags, *chosen, f'--num_actors={actors}']) as run_dir:
            wait_until_steady(run_dir, actors)
            begun = time.monotonic()
            before, cpu_before = counters(run_dir), cpu_by_component()
            time.sleep(seconds)
            after, cpu_after = counters(run_dir), cpu_by_component()
            wall, lag = time.monotonic() - begun, replay_lag(run_dir)
    cpu_after.subtract(cpu_before)
    return {
        'engine': engine,
        'actors': actors,
        'start_seconds': begun - start,
        **{f'{name}_per_second': (after[name] - before[name]) / wall for name in before},
        'replay_lag': lag,
        'cores': sum(cpu_after.values()) / wall,
    }


def main() -> None:
    """Prints the measurements of one run for each engine and number of actors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--engines', default='DirectRunner,DaskRunner,PrismRunner')
    parser.add_argument('--actors', default='1,4,16', help='numbers of actors')
    parser.add_argument('--flags', default='', help='further flags of the runs')
    parser.add_argument('--seconds', type=float, default=60.0, help='how long to observe each')
    arguments = parser.parse_args()
    flags = [*_FLAGS, *shlex.split(arguments.flags)]
    _, preset, values = command_line.parse(flags)
    due = command_line.experiment(preset, values).replay.agent_steps_per_update
    for engine in arguments.engines.split(','):
        alone = 0.0
        for actors in map(int, arguments.actors.split(',')):
            seen = observe(engine, actors, flags, arguments.seconds)
            rate = seen['agent_steps_per_second'] / actors
            alone = alone or rate
            fed = seen['updates_per_second'] * due / seen['agent_steps_per_second']
            print(json.dumps({**seen, 'linear': rate / alone, 'fed': fed}), flush=True)


if __name__ == '__main__':
    main()
