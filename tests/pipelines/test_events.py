"""Heartbeats: what a worker tells of itself, through a real telemetry queue."""

import math
import os

import pytest
import reverb

from infra.telemetry import Telemetry, TelemetryReader, build_table
from pipelines.events import Heartbeat, beat, heartbeats_in, is_event

RECORD = {'kind': 'heartbeat', 'component': 'actor', 'worker': 1, 'submission': 4, 'pid': 77}


def test_a_worker_says_which_job_it_came_with_and_when_it_has_ended():
    server = reverb.Server([build_table()])
    address = f'localhost:{server.port}'
    try:
        with TelemetryReader(address) as reader:
            with Telemetry(address, 'actor', 1, submission=4) as telemetry:
                beat(telemetry)
                telemetry.record('actor', epsilon=0.5)
                beat(telemetry, ended=True)
            records = reader.drain(15.0)
    finally:
        server.stop()
    first = Heartbeat('actor', 1, 4, os.getpid())
    assert heard(records) == [first, Heartbeat('actor', 1, 4, os.getpid(), True)]


@pytest.mark.parametrize(
    'changes',
    [{'pid': pid} for pid in (0, -1, None, 'x', math.nan, math.inf, 2**70)]
    + [{'worker': None}, {'submission': None}, {'submission': -1}, {'component': ['actor']}],
)
def test_a_heartbeat_that_cannot_be_read_names_no_process_to_kill(changes):
    assert heard([RECORD]) == [Heartbeat('actor', 1, 4, 77)]
    assert heard([{**RECORD, **changes}, 'heartbeat', None, {**RECORD, 'kind': 'actor'}]) == []


@pytest.mark.parametrize('time', [0.0, -1e9, 1e12, math.nan, 'x'])
def test_what_the_workers_clock_says_is_of_no_account(time):
    assert heard([{**RECORD, 'time': time}]) == heard([RECORD])


def heard(events):
    """The heartbeats among what came over the telemetry's queue, as the launcher takes it in."""
    return list(heartbeats_in(filter(is_event, events)))
