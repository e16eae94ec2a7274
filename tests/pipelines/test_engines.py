"""The table of engines: the flags of a job, and what is refused before a run starts."""

import dataclasses
import functools
import os
import pathlib
import re
import socket
import time

import apache_beam as beam
import dask
import distributed
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines import run
from pipelines.engines.catalog import ENGINES, engine
from pipelines.engines.dataflow import job_flags, processors
from pipelines.errors import UsageError
from pipelines.experiment import command_line, presets
from pipelines.experiment import config as config_lib
from pipelines.preflight import checklist, dask_cluster
from pipelines.preflight.dask_cluster import require_cluster
from tests.support.engines import dask_cluster as start_dask_cluster
from tests.support.engines import dask_worker
from tests.support.waiting import eventually

DATAFLOW = (
    '--runner=DataflowRunner',
    '--project=p',
    '--region=r',
    '--temp_location=gs://bucket/tmp',
    '--sdk_container_image=image',
)
PRISM = ('--runner=PrismRunner', '--one_job')
PORTABLE = ('--runner=PortableRunner', '--environment_type=EXTERNAL')


def test_direct_runner_means_a_process_for_each_worker():
    flags = engine('DirectRunner').job_flags('actor', 3, ['--job_name=pong'])
    found = PipelineOptions(flags).get_all_options()
    assert found['runner'] == 'FnApiRunner'
    assert found['direct_running_mode'] == 'multi_processing'
    assert found['direct_num_workers'] == 3
    assert found['job_name'] == 'pong'


@pytest.mark.parametrize('runner', ['PrismRunner', 'PortableRunner', 'FlinkRunner', 'SparkRunner'])
def test_a_job_behind_a_job_service_may_last_as_long_as_a_run(runner):
    # Beam gives the streams that follow a job its time-out as their deadline: the job ends with it.
    found = PipelineOptions(engine(runner).job_flags('actor', 1, [])).get_all_options()
    assert found['job_server_timeout'] >= 30 * 24 * 3600
    own = engine(runner).job_flags('actor', 1, ['--job_server_timeout=60'])
    assert PipelineOptions(own).get_all_options()['job_server_timeout'] == 60


def test_dask_gets_a_partition_for_each_worker():
    flags = engine('DaskRunner').job_flags('actor', 3, ['--dask_client_address=tcp://h:1'])
    assert flags[-1] == '--dask_npartitions=3'


@pytest.mark.parametrize(
    ('machine', 'count'),
    [
        (None, 1),
        ('n1-standard-4', 4),
        ('n2-custom-6-8192', 6),
        ('c3-standard-8-lssd', 8),
        ('e2-micro', 1),
    ],
)
def test_processors_are_read_from_the_machine_type(machine, count):
    assert processors(machine) == count


def test_dataflow_gets_as_many_machines_as_the_workers_fill():
    flags = job_flags('actor', 10, ['--worker_machine_type=n2-standard-4'])
    assert '--num_workers=3' in flags  # 10 workers on 4 processors each
    assert '--max_num_workers=3' in flags
    # One learner to a machine with an accelerator, however many processors it has.
    gpu = '--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1'
    flags = job_flags('learner', 2, ['--worker_machine_type=g2-standard-8', gpu])
    assert '--num_workers=2' in flags
    assert '--experiments=no_use_multiple_sdk_containers' in flags
    # With MPS several learners share it, a process for each of 8 processors; by Beam's other name.
    shared = f'--dataflow_service_option={gpu.partition("=")[2]};use_nvidia_mps'
    flags = job_flags('learner', 9, ['--machine_type=g2-standard-8', shared])
    assert '--num_workers=2' in flags
    assert '--experiments=no_use_multiple_sdk_containers' not in flags


def test_a_users_own_number_of_machines_counts_for_dataflow():
    flags = engine('DataflowRunner').job_flags('actor', 10, ['--num_workers=7'])
    assert PipelineOptions(flags).get_all_options()['num_workers'] == 7


def test_flags_of_one_job_go_to_that_job_only():
    launch, _, _ = command_line.parse([*DATAFLOW, "--learner_flags=--zone=z '--labels=a=b c'"])
    assert launch.flags_of('learner') == launch.flags_of('bundle') == ('--zone=z', '--labels=a=b c')
    assert launch.flags_of('actor') == ()


def test_flags_that_only_a_job_server_knows_go_on_to_it():
    portable = ('--runner=PortableRunner', '--job_endpoint=localhost:1')
    with pytest.raises(UsageError, match='did you mean.*--environment_type'):
        command_line.parse([*portable, '--enviroment_type=EXTERNAL'])
    launch, _, _ = command_line.parse(
        [*portable, '--flink_conf_dir=d', '--checkpointing_interval=9']
    )
    assert launch.beam_flags[-1] == '--checkpointing_interval=9'
    with pytest.raises(UsageError, match='did you mean.*--num_actors'):
        command_line.parse([*portable, '--num_actor=3'])


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (('--runner=SparkleRunner',), 'DaskRunner'),
        (('--runner=DaskRunner',), 'tcp://HOST:8786'),
        (('--runner=PortableRunner',), '--job_endpoint'),
        (('--runner=PortableRunner', '--job_endpoint=127.0.0.1:1'), '--environment_type'),
        (('--topology=bundled', '--num_learners=1', '--actor_flags=--zone=z'), '--learner_flags'),
        (('--runner=DaskRunner', '--dask_scheduler_file=/nowhere'), 'does not exist'),
        (('--host=192.0.2.1',), 'not an IPv4 address of this machine'),
        ((*DATAFLOW, '--host=localhost'), '--host'),
        (DATAFLOW[:-1], '--sdk_container_image'),
        (DATAFLOW, '--host'),
        (('--runner=DaskRunner', '--dask_client_address=x', '--dask_npartitions=1'), 'reserved'),
        (('--runner=PrismRunner', '--prism_location=/nowhere/prism'), 'make prism'),
        ((*PORTABLE, '--job_endpoint=127.0.0.1:1'), '127.0.0.1:1: unreachable'),
        ((*PORTABLE, '--job_endpoint=here'), 'host:port'),
        (("--actor_flags='",), 'close the quotes'),
        (('--actor_flags=--num_actors=2',), 'not a Beam flag'),
        (('--learner_flags=--zoner=x',), '--zoner'),
        (('--one_job',), 'may run the steps of a job in turn'),
        ((*PRISM, '--topology=bundled', '--num_learners=1'), 'one job anyway'),
        ((*PRISM, '--learner_flags=--zone=z'), '--learner_ram'),
        ((*PRISM, '--num_learners=3'), 'may run the learners of a job in turn, and there are 3'),
        (('--element_seconds=1',), '--element_seconds 1: no effect on --runner DirectRunner'),
        (('--actor_ram=much',), 'write memory as 4GB'),
        (('--learner_ram=8GB', '--flexrs_goal=COST_OPTIMIZED'), '--flexrs_goal: excludes'),
        (('--statistics_sink=nowhere:f',), '--statistics_sink nowhere:f'),
        ((f'--statistics_dir={__file__}/rows',), 'is no directory that can be written. Fix'),
    ],
)
def test_an_engine_that_cannot_run_is_refused_with_the_remedy(flags, named, tmp_path, capsys):
    assert run.main([f'--run_dir={tmp_path / "run"}', *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_every_engine_names_a_runner_that_beam_has():
    from apache_beam.runners.runner import create_runner

    for name in ENGINES:
        engine(name).register_flags()
        assert create_runner(engine(name).beam_runner) is not None


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    """Address of a cluster of one worker."""
    with start_dask_cluster(tmp_path_factory.mktemp('dask'), num_workers=1) as address:
        yield address


@pytest.fixture
def second_host(cluster, tmp_path):
    """One more worker, on another address of this machine."""
    with dask_worker(cluster, tmp_path, '127.0.0.2', num_workers=1):
        yield


@pytest.fixture
def launch(cluster):
    flags = ['--runner=DaskRunner', f'--dask_client_address={cluster}']
    return command_line.parse(flags)[0]


def bundles(count):
    """An experiment that needs `count` slots."""
    values = {'topology': 'bundled', 'num_actors': count, 'num_learners': count}
    return presets.experiment('laptop', values)


def test_a_fit_dask_cluster_is_described(launch):
    text = require_cluster(bundles(1), launch)
    assert '1 worker processes, 1 of 1 slots free; dashboard http://' in text
    assert 'DASK_CONFIG' not in text  # it has this project's


def test_dask_workers_neither_sample_their_stacks_nor_wake_up_for_nothing(cluster):
    wanted = {
        'distributed.worker.profile.enabled': False,
        'distributed.admin.tick.interval': '1s',
        'distributed.admin.system-monitor.interval': '10s',
    }
    with distributed.Client(cluster, set_as_default=False) as client:
        for name, value in wanted.items():
            assert set(client.run(dask.config.get, name).values()) == {value}


def test_dask_workers_with_the_configuration_for_short_tasks_are_told_of(launch, cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        profile = {'distributed.worker.profile.enabled': True}  # as Dask has it
        for value in (profile, dict.fromkeys(profile, False)):
            client.run(dask.config.set, value)
            text = require_cluster(bundles(1), launch)
            advised = '1 worker processes sample their stacks' in text
            assert advised == value['distributed.worker.profile.enabled']


def test_too_small_a_dask_cluster_is_refused_with_the_figures(launch):
    with pytest.raises(UsageError, match=r'slots \(1, 0 busy\) for 2 bundle.*--nworkers 1'):
        require_cluster(bundles(2), launch)


def test_a_busy_slot_of_a_dask_cluster_counts_as_taken_even_when_its_client_is_gone(
    cluster, launch
):
    with distributed.Client(cluster, set_as_default=False) as client:
        busy = client.submit(time.sleep, 6.0)
        assert eventually(lambda: any(client.processing().values()))
        del busy
    with pytest.raises(UsageError, match=r'\(1, 1 busy\)'):
        require_cluster(bundles(1), launch)

    def free():
        try:
            return bool(require_cluster(bundles(1), launch))
        except UsageError:
            return False

    assert eventually(free)


def test_dask_workers_that_lack_the_environments_package_are_named(launch, tmp_path, monkeypatch):
    (tmp_path / 'simulator_of_the_launcher.py').write_text(
        'from tests.support.environments import counter as make\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    missing = presets.experiment('classic', {'game': 'simulator_of_the_launcher:make'})
    missing = config_lib.replace(missing, {'topology': 'bundled'})  # one slot
    checklist.require_environment(missing, {}, hang_seconds=60)  # it is here
    with pytest.raises(UsageError) as refusal:
        require_cluster(missing, launch)
    assert re.fullmatch(
        r'--environment: Dask worker tcp://127\.0\.0\.1:\d+: simulator_of_the_launcher:make:'
        r" ModuleNotFoundError: No module named 'simulator_of_the_launcher', in \S+ on \S+\. Fix:"
        r' install its package there .*, or put your own module on PYTHONPATH there\.',
        str(refusal.value),
    )
    there = config_lib.replace(missing, {'game': 'tests.support.environments:counter'})
    assert require_cluster(there, launch)


def test_slots_are_counted_on_the_hosts_asked_for(launch):
    elsewhere = dataclasses.replace(launch, learner_flags=('--dask_hosts=192.0.2.1',))
    with pytest.raises(UsageError, match=r'worker slots on 192\.0\.2\.1 \(0, 0 busy\)'):
        require_cluster(bundles(1), elsewhere)
    here = dataclasses.replace(launch, learner_flags=('--dask_hosts=127.0.0.1',))
    assert require_cluster(bundles(1), here)
    # One slot for the actor, one for the learner, and both may only have the same one.
    both = dataclasses.replace(launch, beam_flags=(*launch.beam_flags, '--dask_hosts=127.0.0.1'))
    experiment = presets.experiment('laptop', {'num_actors': 1, 'num_learners': 1})
    with pytest.raises(UsageError, match=r'slots on 127\.0\.0\.1 \(1, 0 busy\) for 1 actor'):
        require_cluster(experiment, both)


class FailOnce(beam.DoFn):
    """Fails the first time, and notes every time."""

    def __init__(self, notes: str):
        self._notes = notes

    def process(self, element):
        with open(self._notes, 'a') as notes:
            notes.write(f'{element}\n')
        if len(pathlib.Path(self._notes).read_text().splitlines()) == 1:
            raise RuntimeError('the first time')


def test_dask_runs_an_element_again_that_failed(launch, tmp_path):
    notes = tmp_path / 'notes'
    beam_options = PipelineOptions(launch.engine.job_flags('actor', 1, launch.beam_flags))
    with launch.engine.job_context(beam_options):
        pipeline = beam.Pipeline(options=beam_options)
        _ = pipeline | beam.Create(['actor']) | beam.ParDo(FailOnce(str(notes)))
        pipeline.run().wait_until_finish()
    assert notes.read_text().splitlines() == ['actor', 'actor']


class NoteWhere(beam.DoFn):
    """Notes the address of the Dask worker that it runs on."""

    def __init__(self, notes: str):
        self._notes = notes

    def process(self, element):
        pathlib.Path(self._notes).write_text(distributed.get_worker().address)


@pytest.mark.parametrize('host', ['127.0.0.1', '127.0.0.2'])
def test_a_job_runs_on_the_hosts_asked_for(launch, second_host, tmp_path, host):
    notes = tmp_path / 'notes'
    flags = (*launch.beam_flags, f'--dask_hosts={host}')
    beam_options = PipelineOptions(launch.engine.job_flags('actor', 1, flags))
    with launch.engine.job_context(beam_options):
        pipeline = beam.Pipeline(options=beam_options)
        _ = pipeline | beam.Create(['actor']) | beam.ParDo(NoteWhere(str(notes)))
        pipeline.run().wait_until_finish()
    assert notes.read_text().startswith(f'tcp://{host}:')


def test_dask_workers_that_cannot_reach_a_server_are_told_of(launch):
    with socket.create_server(('127.0.0.1', 0)) as closed:
        address = f'127.0.0.1:{closed.getsockname()[1]}'
    away = dataclasses.replace(launch, replay_addresses=(address,))
    with pytest.raises(UsageError, match=f'{address}: unreachable for 1 of 1 Dask workers.*--host'):
        require_cluster(bundles(1), away)


async def die_once(notes, addresses, dask_worker=None):
    """Ends the process of the Dask worker that is asked first; later ones look around."""
    if not notes.exists():
        notes.touch()
        os._exit(1)
    return await dask_cluster.look_around(addresses, dask_worker)


def test_a_dask_worker_that_dies_while_it_is_asked_is_asked_again(launch, tmp_path, monkeypatch):
    notes = tmp_path / 'notes'
    monkeypatch.setattr(dask_cluster, 'look_around', functools.partial(die_once, notes))
    require_cluster(bundles(1), launch)
    assert notes.exists()


def test_dask_workers_with_other_code_are_refused(launch, monkeypatch):
    monkeypatch.setattr(dask_cluster, '_CODE', 'changed')
    with pytest.raises(UsageError, match='another version of this project'):
        require_cluster(bundles(1), launch)


def test_a_dask_scheduler_that_does_not_answer_is_named(launch):
    flags = ('--dask_client_address=tcp://127.0.0.1:1', '--dask_connection_timeout=1')
    with pytest.raises(UsageError, match=r'tcp://127\.0\.0\.1:1: no Dask scheduler answers'):
        require_cluster(bundles(1), dataclasses.replace(launch, beam_flags=flags))
