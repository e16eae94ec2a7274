"""Jobs as the real DataflowRunner submits them, seen from an endpoint in the service's place."""

import pathlib
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2

from pipelines.engines import dataflow
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.preflight import engine
from tests.support.fake_dataflow import FakeDataflow
from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUBMIT_SECONDS = 90.0
ADDRESSES = (
    '--parameter_addresses=10.0.0.1:7101',
    '--replay_addresses=10.0.0.2:7001',
    '--telemetry_address=10.0.0.2:7001',
)


class Submission:
    """A job's process, and what it has sent."""

    def __init__(self, service: FakeDataflow, process: subprocess.Popen, staging: pathlib.Path):
        self._service = service
        self._staging = staging
        self.process = process

    @property
    def request(self) -> dict:
        """The job as the service was sent it."""
        (job,) = self._service.jobs
        return job

    @property
    def pool(self) -> dict:
        """The one pool of workers of the job."""
        (pool,) = self.request['environment']['workerPools']
        return pool

    @property
    def options(self) -> dict:
        """Beam's options as the workers will see them."""
        return self.request['environment']['sdkPipelineOptions']['options']

    @property
    def pipeline(self) -> beam_runner_api_pb2.Pipeline:
        """The portable pipeline that the job runs."""
        text = (self._staging / 'pipeline.pb').read_bytes()
        return beam_runner_api_pb2.Pipeline.FromString(text)

    def end(self) -> int:
        """Ends the process as the launcher does, who asks twice; returns its exit code."""
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@pytest.fixture
def submit(tmp_path) -> Iterator:
    """Submits a job of three workers of one or two kinds, with flags of the user's."""
    processes: list[subprocess.Popen] = []
    with FakeDataflow() as service:

        def start(kinds: str, *flags: str) -> Submission:
            topology = 'bundled' if kinds == 'bundle' else 'separate'
            values = {'num_actors': 3, 'num_learners': 3, 'topology': topology}
            config = tmp_path / 'config.json'
            config.write_text(config_lib.to_json(presets.experiment('laptop', values)))
            job = [sys.executable, '-m', 'pipelines.job']
            job += [f'--{kind}s=0,1,2' for kind in kinds.split('-')]
            given = ['--project=p', '--region=r', f'--temp_location={tmp_path}']
            given += ['--sdk_container_image=registry/gorila:1', *service.flags, *flags]
            engine.require_flags('DataflowRunner', given)
            job += ['--submission=0', f'--config={config}', *ADDRESSES, '--runner=DataflowRunner']
            with (tmp_path / 'log').open('wb') as log:
                process = subprocess.Popen([*job, *given], cwd=ROOT, stdout=log, stderr=log)
            processes.append(process)
            submitted = eventually(lambda: len(service.jobs) == 1, SUBMIT_SECONDS)
            assert submitted, (tmp_path / 'log').read_text()
            return Submission(service, process, tmp_path)

        start.service = service  # type: ignore[attr-defined]
        yield start
        for process in processes:
            process.kill()
            process.wait()


def dofns(pipeline: beam_runner_api_pb2.Pipeline) -> dict[str, beam_runner_api_pb2.ParDoPayload]:
    """The payloads of the splittable DoFns, by the names of their steps."""
    found = {}
    for transform in pipeline.components.transforms.values():
        if transform.spec.urn == 'beam:transform:pardo:v1':
            payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
            if payload.restriction_coder_id:
                found[transform.unique_name] = payload
    return found


def hints_of(
    pipeline: beam_runner_api_pb2.Pipeline, step: str
) -> tuple[dict[str, bytes], list[dict[str, bytes]]]:
    """The resource hints of a step, and the different ones of all other steps."""
    transforms, environments = pipeline.components.transforms, pipeline.components.environments
    (own,) = [each.environment_id for each in transforms.values() if each.unique_name == step]
    others = sorted({each.environment_id for each in transforms.values()} - {'', own})
    return dict(environments[own].resource_hints), [
        dict(environments[each].resource_hints) for each in others
    ]


ROW_CODER = 'beam:coder:row:v1'


def unbounded(pipeline: beam_runner_api_pb2.Pipeline, step: str) -> bool:
    """Whether the output of a step has no end."""
    components = pipeline.components
    (found,) = [each for each in components.transforms.values() if each.unique_name == step]
    outputs = [components.pcollections[name] for name in found.outputs.values()]
    return all(each.is_bounded == beam_runner_api_pb2.IsBounded.UNBOUNDED for each in outputs)


def test_actors_get_machines_of_a_fixed_number_and_one_thread_a_process(submit):
    job = submit(
        'actor',
        '--job_name=pong-actor-0',
        '--worker_machine_type=n2-standard-2',
        '--subnetwork=regions/r/subnetworks/s',
        '--no_use_public_ips',
        '--experiments=use_network_tags=gorila',
        '--labels=team=rl',
        '--disk_size_gb=30',
    )
    assert job.request['type'] == 'JOB_TYPE_STREAMING'
    assert job.options['element_processing_timeout_minutes'] == 4  # twice --hang_seconds
    assert job.request['name'] == 'pong-actor-0'
    assert job.request['path'].startswith('/v1b3/projects/p/locations/r/jobs')
    assert job.request['labels'] == {'gorila': 'actor', 'team': 'rl'}
    pool = job.pool
    assert pool['numWorkers'] == 2  # three actors on machines of two processors
    assert pool['autoscalingSettings'] == {
        'algorithm': 'AUTOSCALING_ALGORITHM_NONE',
        'maxNumWorkers': 2,
    }
    assert pool['numThreadsPerWorker'] == 1
    assert pool['machineType'] == 'n2-standard-2'
    assert pool['diskSizeGb'] == 30
    assert pool['subnetwork'] == 'regions/r/subnetworks/s'
    assert pool['ipConfiguration'] == 'WORKER_IP_PRIVATE'
    (image,) = pool['sdkHarnessContainerImages']
    assert image['containerImage'] == 'registry/gorila:1'
    # use_multiple_sdk_containers: a process for each virtual processor.
    expected = {'use_runner_v2', 'use_multiple_sdk_containers', 'use_network_tags=gorila'}
    assert expected <= set(job.request['environment']['experiments'])
    assert list(dofns(job.pipeline)) == ['Actor/Act']
    assert unbounded(job.pipeline, 'Actor/Act')


def test_learners_get_an_accelerator_each_and_one_process_a_machine(submit):
    job = submit(
        'learner',
        '--worker_machine_type=g2-standard-8',
        '--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver',
    )
    assert job.pool['numWorkers'] == 3
    assert job.pool['numThreadsPerWorker'] == 1
    environment = job.request['environment']
    assert 'no_use_multiple_sdk_containers' in environment['experiments']
    assert 'use_multiple_sdk_containers' not in environment['experiments']
    assert environment['serviceOptions'] == [
        'worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver'
    ]
    assert list(dofns(job.pipeline)) == ['Learner/Learn']


def test_bundles_are_one_splittable_dofn_behind_a_reshuffle_with_the_users_resource_hints(submit):
    job = submit('bundle', '--resource_hint=min_ram=4GB')
    pipeline = job.pipeline
    (payload,) = dofns(pipeline).values()
    assert payload.restriction_coder_id in pipeline.components.coders
    urns = [each.spec.urn for each in pipeline.components.transforms.values()]
    assert 'beam:transform:reshuffle:v1' in urns
    hints = [dict(each.resource_hints) for each in pipeline.components.environments.values()]
    assert hints == [{'beam:resources:min_ram_bytes:v1': b'4000000000'}]
    assert job.pool['numWorkers'] == 3


def test_hints_say_what_a_worker_needs_so_that_right_fitting_finds_its_machine(submit):
    accelerator = 'type:nvidia-l4;count:1;install-nvidia-driver'
    job = submit('learner', '--learner_ram=8GB', f'--learner_accelerator={accelerator}')
    pipeline = job.pipeline
    hints, others = hints_of(pipeline, 'Learner/Learn')
    assert hints == {
        'beam:resources:min_ram_bytes:v1': b'8000000000',
        'beam:resources:accelerator:v1': accelerator.encode(),
    }
    assert others == [{}]  # what is not a learner needs no hint
    assert 'no_use_multiple_sdk_containers' in job.request['environment']['experiments']
    # In a streaming job right fitting needs a service that scales; here between equal bounds.
    assert job.pool['numWorkers'] == 3
    assert job.pool['autoscalingSettings'] == {
        'algorithm': 'AUTOSCALING_ALGORITHM_BASIC',
        'maxNumWorkers': 3,
    }
    assert job.request['environment']['serviceOptions'] == ['min_num_workers=3']


def test_one_job_holds_both_kinds_each_with_its_own_hints(submit):
    job = submit(
        'actor-learner',
        '--actor_ram=4GB',
        '--learner_ram=8GB',
        '--statistics_dir=gs://bucket/statistics',
    )
    pipeline = job.pipeline
    assert sorted(dofns(pipeline)) == ['Actor/Act', 'Learner/Learn']
    for step, ram in (('Actor/Act', b'4000000000'), ('Learner/Learn', b'8000000000')):
        assert hints_of(pipeline, step)[0] == {'beam:resources:min_ram_bytes:v1': ram}
        assert unbounded(pipeline, step)
    roots = pipeline.components.transforms[pipeline.root_transform_ids[0]].subtransforms
    names = [pipeline.components.transforms[each].unique_name for each in roots]
    assert names == ['Actor', 'Actor statistics', 'Learner', 'Learner statistics']
    assert job.request['type'] == 'JOB_TYPE_STREAMING'
    assert job.request['labels'] == {'gorila': 'actor-learner'}
    assert job.pool['numWorkers'] == 6


def test_segments_and_rows_travel_by_coders_of_their_types(submit):
    job = submit('actor', '--statistics_dir=gs://bucket/statistics')
    components = job.pipeline.components
    (step,) = [t for t in components.transforms.values() if t.unique_name == 'Actor/Act']
    (output,) = step.outputs.values()
    assert components.coders[components.pcollections[output].coder_id].spec.urn == ROW_CODER
    names = {each.unique_name for each in components.transforms.values()}
    tables = {f'Actor statistics/Write {table}' for table in ('episodes', 'segments', 'periods')}
    assert tables <= names


def test_a_batch_job_that_scales_is_cancelled_when_its_submitter_is_ended(submit):
    scales = ['--autoscaling_algorithm=THROUGHPUT_BASED', '--max_num_workers=9']
    job = submit('actor', '--element_seconds=0', *scales)
    assert job.request['type'] == 'JOB_TYPE_BATCH'
    assert not unbounded(job.pipeline, 'Actor/Act')
    assert job.pool['autoscalingSettings'] == {
        'algorithm': 'AUTOSCALING_ALGORITHM_BASIC',
        'maxNumWorkers': 9,
    }
    assert job.end() == 128 + signal.SIGTERM
    assert submit.service.requested == [('job-0', 'JOB_STATE_CANCELLED')]


def test_a_streaming_job_is_drained_when_its_submitter_is_ended(submit):
    job = submit('learner')
    assert job.request['type'] == 'JOB_TYPE_STREAMING'
    assert job.end() == 128 + signal.SIGTERM
    assert submit.service.requested == [('job-0', 'JOB_STATE_DRAINING')]


def test_a_jobs_state_and_page_are_told_until_it_has_ended(monkeypatch):
    monkeypatch.setattr(dataflow, '_FOLLOW_SECONDS', 0.05)
    told: list[str] = []
    with FakeDataflow() as service:
        options = PipelineOptions(['--project=p', '--region=r', *service.flags])
        job = types.SimpleNamespace(job_id=lambda: 'job-0')
        thread = threading.Thread(target=dataflow.follow, args=(job, options, told.append))
        thread.start()
        assert eventually(lambda: len(told) == 1)
        service.state = 'JOB_STATE_DONE'
        thread.join(10)
        assert not thread.is_alive()
    page = 'https://console.cloud.google.com/dataflow/jobs/r/job-0?project=p'
    assert told == [f'running, {page}', f'done, {page}']


def test_a_streaming_job_that_does_not_drain_is_cancelled(monkeypatch):
    monkeypatch.setattr(dataflow, 'DRAIN_SECONDS', 0.5)
    with FakeDataflow() as service:
        service.drains = False
        flags = ['--project=p', '--region=r', '--streaming', *service.flags]
        options = PipelineOptions(flags)
        dataflow.end(types.SimpleNamespace(job_id=lambda: 'job-0'), options)
        assert service.requested == [
            ('job-0', 'JOB_STATE_DRAINING'),
            ('job-0', 'JOB_STATE_CANCELLED'),
        ]
