"""A job's process when the worker processes of Beam's local runner fail."""

import dataclasses
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from pipelines.engines import catalog
from pipelines.launch import beam_job
from pipelines.launch.interrupts import Ended

# Beam's worker processes end before they connect, the jobs' own process goes on.
_NO_WORKERS = """
import os, sys
if any('sdk_worker' in part for part in sys.orig_argv):
    os._exit(7)
"""
_JOB = """
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from pipelines.launch import beam_job

beam_job.end_with_workers(2)
flags = ['--runner=FnApiRunner', '--direct_running_mode=multi_processing', '--direct_num_workers=2']
with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
    pipeline | beam.Create([0, 1]) | beam.Reshuffle() | beam.Map(print)
"""


def test_a_job_of_which_every_worker_process_has_failed_ends(tmp_path, monkeypatch):
    (tmp_path / 'sitecustomize.py').write_text(_NO_WORKERS)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    ended = subprocess.run([sys.executable, '-c', _JOB], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    expected = 'worker process 2 of 2 failed: Worker subprocess exited with return code 7'
    assert expected in ended.stderr


@dataclasses.dataclass
class Pipeline:
    """A pipeline and its result, on an engine that goes on without its submitter."""

    when: str
    error: type[Exception] | None = None

    def run(self) -> 'Pipeline':
        self.signalled('submitted')
        return self

    def wait_until_finish(self) -> None:
        self.signalled('running')

    def signalled(self, phase: str) -> None:
        if phase == self.when:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                if self.error is not None:
                    raise self.error('in the clean-up')


@pytest.mark.parametrize(
    ('pipeline', 'ended'),
    [
        (Pipeline('submitted'), True),
        (Pipeline('running'), True),
        (Pipeline('running', RuntimeError), True),
        (Pipeline('submitted', RuntimeError), False),  # there is no job
    ],
)
def test_a_signal_ends_a_job_that_would_go_on(pipeline, ended):
    jobs: list[Any] = []
    engine = dataclasses.replace(
        catalog.engine('PortableRunner'), end=lambda result, _: jobs.append(result)
    )
    kind = RuntimeError if pipeline.when == 'running' and pipeline.error else Ended
    with pytest.raises(kind):
        beam_job.run(pipeline, None, engine)
    assert jobs == [pipeline] * ended
