"""Both topologies on engines that exist: a Dask cluster, Prism, a job server with a worker pool."""

import json
import os
import pathlib
import re
import subprocess
import sys
import uuid

import distributed
import psutil
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineResult

from infra import cores
from pipelines import evaluate
from pipelines.experiment import presets
from tests.end_to_end import launching
from tests.support import engines, saved_run
from tests.support.fake_dataflow import FakeDataflow
from tests.support.waiting import eventually

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

SEPARATE = ('--num_actors=1', '--num_learners=1')
SMALL = (*launching.SMALL, '--num_parameter_shards=1')
BUNDLED = ('--topology=bundled', '--num_actors=2', '--num_learners=2', '--game=breakout')


def check_bundles(summary: dict, agent_steps: int = 1_500) -> None:
    # 400 of the agent steps come before the first update, 4 an update; segments of 64 steps may
    # still be unlearned, or have come on top, in each of the two bundles.
    assert summary['updates'] == pytest.approx((agent_steps - 400) / 4, abs=2 * 2 * 64 / 4)
    assert summary['episodes'] > 0


def train(run_dir: pathlib.Path, *flags: str, max_frames: int = 6_000) -> dict:
    """Runs the main job to its end; returns its summary, with which its statistics agree."""
    process = launching.start(run_dir, f'--max_frames={max_frames}', *flags, *SMALL)
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, max_frames)
    launching.check_statistics(run_dir, summary)
    return summary


def parts(summary: dict, kind: str) -> int:
    """How often elements of a kind were begun or continued."""
    return summary['beam'][kind]['start_milliseconds']['count']


def wait_for_restarts(run_dir: pathlib.Path, count: int) -> None:
    """Waits until the job has told of so many replaced workers."""
    told = eventually(lambda: launching.output(run_dir).count(' restarted') >= count, 90.0)
    assert told, launching.output(run_dir)


@pytest.fixture(scope='module')
def dask_flags(tmp_path_factory):
    with engines.dask_cluster(tmp_path_factory.mktemp('dask'), num_workers=2) as address:
        yield ('--runner=DaskRunner', f'--dask_client_address={address}')


@pytest.fixture(scope='module')
def portable_flags(tmp_path_factory):
    directory = tmp_path_factory.mktemp('portable')
    with engines.job_server(directory) as server, engines.worker_pool(directory) as pool:
        yield (
            '--runner=PortableRunner',
            f'--job_endpoint={server}',
            '--environment_type=EXTERNAL',
            f'--environment_config={pool}',
        )


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with a checkpoint of an untrained network."""
    path = tmp_path_factory.mktemp('saved') / 'run'
    saved_run.write(path, presets.experiment('laptop', {'game': 'breakout'}))
    return path


def _worker_pids(address: str) -> list[int]:
    """Process IDs of a Dask cluster's workers."""
    with distributed.Client(address) as client:
        return list(client.run(os.getpid).values())


def evaluated(directory: pathlib.Path, *flags: str) -> dict:
    """Evaluates as the command does; returns the scores alone."""
    output = directory / f'{uuid.uuid4().hex}.json'
    assert evaluate.main([*flags, f'--output={output}']) == 0
    result = json.loads(output.read_text())
    assert result['failed'] == 0
    return {name: result[name] for name in ('mean', 'std', 'median', 'returns', 'details')}


RANDOM = ('--policy=random', '--games=breakout')  # its workers start without TensorFlow


class TestOnDask:
    """In one class, so that they share a cluster."""

    def test_dask_replaces_killed_workers_and_frames_and_updates_are_counted_once(
        self, tmp_path, dask_flags
    ):
        """In one job."""
        run_dir, budget = tmp_path / 'run', 24_000
        flags = (*dask_flags, *SEPARATE, '--one_job', f'--max_frames={budget}', *SMALL)
        process = launching.start(run_dir, *flags)
        launching.wait_for_updates(process, run_dir)
        assert 'dashboard http://' in launching.output(run_dir)
        killed = _worker_pids(dask_flags[1].partition('=')[2])
        assert len(killed) == 2
        for count, pid in enumerate(killed, 1):  # an actor and a learner, whichever is the first
            psutil.Process(pid).kill()
            wait_for_restarts(run_dir, count)
        assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
        summary = launching.check_run_directory(run_dir, budget)
        assert summary['restarts'] == {'actor': 1, 'learner': 1}
        steps = summary['agent_steps']
        assert budget / 4 <= steps < budget / 4 + 500
        saved = json.loads(
            sorted(run_dir.glob('checkpoints/checkpoint-*/run.json'))[-1].read_text()
        )
        # The replay counts by itself. The killed actor took with it what was on its way, up to 49
        # items and a window of 4 steps in each of 4 environments; 64 steps it had not told of.
        assert saved['inserts'] == pytest.approx(steps, abs=150)
        # Each of two learners had up to 3 batches drawn and one computed when it ended.
        in_vain = saved['samples'] - 32 * (summary['updates'] + summary['rejected']['outlier'])
        assert 0 <= in_vain <= 2 * 4 * 32

    def test_somebody_elses_agent_trains_in_bundles_on_a_dask_cluster(self, tmp_path, dask_flags):
        """And plays by the policy that the run exported."""
        run_dir = tmp_path / 'run'
        flags = (
            flag for flag in launching.SMALL if not flag.startswith('--torso')
        )  # it brings its own
        process = launching.start(
            run_dir,
            '--agent=tests.examples.own_agent:munchausen',
            '--num_parameter_shards=1000',
            '--max_frames=10000',
            f'--statistics_dir={run_dir / "statistics"}',
            *dask_flags,
            *BUNDLED,
            *flags,
        )
        assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
        started = f'--num_parameter_shards 1000: {cores.whole_cores()} start, one for each core'
        assert started in launching.output(run_dir)
        summary = launching.check_run_directory(run_dir, 10_000)
        check_bundles(summary, agent_steps=2_500)
        launching.check_statistics(run_dir, summary)
        script = [sys.executable, 'tests/examples/play_a_trained_policy.py', str(run_dir)]
        played = subprocess.run(
            script, cwd=launching.ROOT, capture_output=True, text=True, timeout=90
        )
        assert played.returncode == 0, played.stderr
        assert re.fullmatch(
            rf'{summary["updates"]} updates, -?\d+ points in 400 steps\n', played.stdout
        )

    def test_an_evaluation_with_a_network_is_the_same_on_every_engine(
        self, saved, dask_flags, tmp_path, capfd
    ):
        # Half of the actions are the network's; games of Breakout differ in score and length.
        flags = (f'--run_dir={saved}', '--episodes=8', '--epsilon=0.5')
        expected = evaluated(tmp_path, *flags, '--num_workers=1')
        assert len(set(expected['returns'])) > 1
        assert len({game['frames'] for game in expected['details']}) > 4
        assert evaluated(tmp_path, *flags, '--num_workers=4') == expected
        assert evaluated(tmp_path, *flags, '--runner=DirectRunner', '--num_workers=2') == expected
        assert evaluated(tmp_path, *flags, *dask_flags, '--num_workers=2') == expected
        prism = ('--runner=PrismRunner', f'--prism_location={engines.prism()}')
        assert evaluated(tmp_path, *flags, *prism) == expected
        # Beam's own lines stay in its log.
        errors = capfd.readouterr().err.splitlines()
        assert all(text.startswith('evaluate.py: ') for text in errors), errors

    def test_an_evaluation_is_the_same_with_any_number_of_workers(self, dask_flags, tmp_path):
        """Two workers play in the test above."""
        flags = (*RANDOM, '--episodes=8')
        expected = evaluated(tmp_path, *flags, '--num_workers=1')
        assert len(set(expected['returns'])) > 1
        for workers in (1, 4):
            direct = ('--runner=DirectRunner', f'--num_workers={workers}')
            assert evaluated(tmp_path, *flags, *direct) == expected
            assert evaluated(tmp_path, *flags, *dask_flags, f'--num_workers={workers}') == expected


def on_prism() -> tuple[str, ...]:
    return '--runner=PrismRunner', f'--prism_location={engines.prism()}', '--element_seconds=1'


def test_separate_topology_trains_on_prism_in_one_job_whose_elements_are_continued(tmp_path):
    summary = train(tmp_path / 'run', *on_prism(), *SEPARATE, '--one_job', max_frames=16_000)
    assert summary['restarts'] == {}  # by a new process, or a new worker in this one
    assert parts(summary, 'actor') >= 2
    assert parts(summary, 'learner') >= 2
    starts = summary['beam']['actor']['start_milliseconds']
    assert 10 * starts['min'] < starts['max']  # a continuation, and the first start
    launching.assert_nothing_runs(tmp_path / 'run', within_seconds=10)


def test_bundles_train_on_prism(tmp_path):
    summary = train(tmp_path / 'run', *on_prism(), *BUNDLED, max_frames=20_000)
    check_bundles(summary, agent_steps=5_000)
    assert parts(summary, 'bundle') >= 3


class TestOnAJobServer:
    """Of Prism, with a worker pool."""

    def test_bundles_train_on_a_job_server_and_a_killed_worker_of_the_pool_is_replaced(
        self, tmp_path, portable_flags
    ):
        run_dir = tmp_path / 'run'
        flags = (*portable_flags, *BUNDLED, '--max_frames=16000', *SMALL)
        process = launching.start(run_dir, *flags)
        launching.wait_for_updates(process, run_dir)
        harness, *_ = [
            child
            for child in psutil.Process().children(recursive=True)
            if any('SdkHarness' in part for part in child.cmdline())
        ]
        harness.kill()
        assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
        summary = launching.check_run_directory(run_dir, 16_000)
        assert summary['restarts'] == {'bundle': 1}  # each is a job with a process of its own

    def test_jobs_submitted_to_dataflow_train_where_their_pipelines_are_run(
        self, tmp_path, portable_flags
    ):
        """An endpoint takes the service's place, Beam's SDK harness in a pool its workers'.

        So this is the separate topology on a job server with a worker pool, too.
        """
        run_dir = tmp_path / 'run'
        with FakeDataflow() as service, launching.servers(tmp_path, *SEPARATE, *SMALL) as attach:
            flags = [
                '--runner=DataflowRunner',
                '--project=p',
                '--region=r',
                *service.flags,
                *attach,
            ]
            flags += [f'--temp_location={tmp_path}', '--sdk_container_image=image']
            for kind in ('actor', 'learner'):
                (tmp_path / kind).mkdir()
                flags.append(f'--{kind}_flags=--staging_location={tmp_path / kind}')
            process = launching.start(run_dir, *flags, *SEPARATE, '--max_frames=6000', *SMALL)
            submitted = eventually(lambda: len(service.jobs) == 2, launching.START_SECONDS)
            assert submitted, launching.output(run_dir)
            for kind, job in zip(('actor-0', 'learner-1'), sorted(j['name'] for j in service.jobs)):
                assert re.fullmatch(f'gorila-run-[0-9a-f]{{6}}-{kind}', job)
            page = 'learner job 1: running, https://console.cloud.google.com/dataflow/jobs/r/job-'
            assert eventually(lambda: page in launching.output(run_dir), 60.0)
            results = [
                run_portably(tmp_path / kind / 'pipeline.pb', portable_flags)
                for kind in ('actor', 'learner')
            ]
            for result in results:
                result.wait_until_finish()
            service.state = 'JOB_STATE_DONE'
            assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
        summary = launching.check_run_directory(run_dir, 6_000)
        assert summary['restarts'] == {}


def run_portably(file: pathlib.Path, flags: tuple[str, ...]) -> PipelineResult:
    """Submits a staged pipeline to the job server, its container replaced by the worker pool."""
    options = PipelineOptions(flags)
    pipeline = beam_runner_api_pb2.Pipeline.FromString(file.read_bytes())
    pool = PortableRunner()._create_environment(options).to_runner_api(None)
    for name, environment in pipeline.components.environments.items():
        del environment.dependencies[:]  # the pool has them installed, as the image would
        pipeline.components.environments[name].urn = pool.urn
        pipeline.components.environments[name].payload = pool.payload
    return PortableRunner().run_portable_pipeline(pipeline, options)


def test_an_evaluation_survives_the_death_of_a_worker(tmp_path):
    flags = (*RANDOM, '--episodes=30')
    output, said = tmp_path / 'result.json', tmp_path / 'stderr'
    direct = ('--runner=DirectRunner', '--num_workers=2')
    with said.open('w') as stderr:
        process = subprocess.Popen(
            [sys.executable, '-m', 'pipelines.evaluate', *flags, *direct, f'--output={output}'],
            stderr=stderr,
            # Without the level of TensorFlow's messages that the tests set.
            env={**os.environ, 'TMPDIR': str(tmp_path), 'TF_CPP_MIN_LOG_LEVEL': '3'},
        )
    played = lambda: list(tmp_path.glob('gorila-scratch-*/played-*'))  # noqa: E731
    assert eventually(lambda: len(played()) > 4, 60.0)
    workers = psutil.Process(process.pid).children(recursive=True)
    # Not the shell that starts it.
    next(worker for worker in workers if worker.name().startswith('python')).kill()
    expected = evaluated(tmp_path, *flags, '--num_workers=1')
    assert process.wait(120) == 0, said.read_text()
    assert 'games are missing and played again' in said.read_text()
    assert not re.search(r'of (?!30 )\d+ episodes', said.read_text())  # the second job counts on
    result = json.loads(output.read_text())
    assert (result['failed'], result['details']) == (0, expected['details'])
