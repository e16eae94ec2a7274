"""A job's process when the worker processes of Beam's local runner fail."""

import subprocess
import sys

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
