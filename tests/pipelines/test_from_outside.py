"""What others left or sent, and is not ours, is left out or refused where it enters."""

import json
import time

import numpy as np
import pytest
import reverb

from infra import process, telemetry
from pipelines import plan
from pipelines.errors import UsageError
from pipelines.monitoring import episodes
from pipelines.storage import remote_run
from pipelines.storage.evaluations import read_result
from pipelines.storage.run_directory import RunDirectory

HUGE = 10**400  # JSON has it; no float does
BYTES = b'{"port": "\xff"}'


@pytest.mark.parametrize(
    'content',
    [BYTES, b'{}', b'[]', b'{"port": "1"}', b'{"port": 70000}', b'{"port": true}', b'[' * 100_000],
    ids=lambda content: repr(content[:20]),
)
def test_a_ready_file_that_is_not_ours_is_none(tmp_path, content):
    file = tmp_path / 'ready'
    file.write_bytes(content)
    spec = process.ProcessSpec('server', ['true'], tmp_path / 'log', ready_file=file)
    assert process.SupervisedProcess(spec).ready() is None


@pytest.mark.parametrize('text', ['\u00b2', '0', '-1', '9' * 20, 'nobody', ''])
def test_a_lock_that_names_no_process_names_nobody(directory, text):
    lock = directory.path / '.lock'
    lock.write_text(text)
    assert RunDirectory.existing(directory.path).holder() is None
    lock.write_text('4194303\n')
    assert RunDirectory.existing(directory.path).holder() == 4194303


EPISODE = {'episode': 1, 'frames': 4, 'updates': 0, 'raw_return': 1.0}


@pytest.mark.parametrize(
    'change',
    [{'raw_return': HUGE}, {'time': [1]}, {'worker': {}}, {'frames': True}, {'epsilon': 'a'}],
    ids=lambda change: next(iter(change)),
)
def test_an_episode_with_a_value_that_is_no_number_is_left_out(tmp_path, change):
    file = tmp_path / 'episodes.jsonl'
    file.write_text(f'{json.dumps({**EPISODE, **change})}\n{json.dumps(EPISODE)}\n')
    (row,) = episodes.read_episodes(file)
    assert (row.raw_return, row.time, row.worker) == (1.0, 0.0, 0)


@pytest.mark.parametrize(
    ('content', 'updates'),
    [
        (b'{"updates": 7}', 7),
        (b'{"updates": "7"}', -1),
        (b'{"updates": 7, "seal": "sha256", "checksum": "0"}', -1),
        (BYTES, -1),
        (None, -1),
    ],
)
def test_updates_of_a_remote_checkpoint_are_read_by_its_seal(content, updates):
    assert remote_run.updates_in(content) == updates


@pytest.mark.parametrize('when', [HUGE, float('nan'), float('inf'), 'noon', None])
def test_an_owner_whose_time_is_no_number_was_heard_of_now(when):
    assert remote_run.age_of({'time': when}) == 0.0


def test_an_owner_with_a_time_is_as_old_as_that():
    assert remote_run.age_of({'time': time.time() - 60}) == pytest.approx(60, abs=5)


RESULT = {'protocol': 'no-op starts', 'episodes': 2, 'epsilon': 0.0, 'mean': 1.5, 'std': 0.5}


@pytest.mark.parametrize(
    'change', [{'mean': None}, {'std': HUGE}, {'episodes': -1}, {'protocol': 3}], ids=repr
)
def test_an_evaluation_that_is_not_ours_is_none(tmp_path, change):
    file = tmp_path / 'evaluation.json'
    assert read_result(file) is None
    file.write_text(json.dumps(RESULT))
    assert read_result(file) == RESULT
    file.write_text(json.dumps({**RESULT, **change}))
    assert read_result(file) is None


@pytest.mark.parametrize('content', [BYTES, b'{"agent_steps": 1}', b'[' * 100_000])
def test_costs_that_are_not_ours_are_one_short_line(tmp_path, content):
    file = tmp_path / 'costs.json'
    file.write_bytes(content)
    with pytest.raises(UsageError, match='--costs') as refusal:
        plan.read_costs(file)
    assert '\n' not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_telemetry_that_is_no_list_costs_nothing_that_came_with_it():
    server = reverb.Server([telemetry.build_table()])
    address = f'localhost:{server.port}'
    try:
        client = reverb.Client(address)
        for text in (b'7', b'\xff', b'[' * 100_000, json.dumps([{'kind': 'ours'}]).encode()):
            client.insert(np.array(text, object), {telemetry.TELEMETRY_TABLE: 1.0})
        drained: list = []
        with telemetry.TelemetryReader(address) as reader:
            deadline = time.monotonic() + 15.0
            while len(drained) < 4 and time.monotonic() < deadline:
                drained += reader.drain(timeout_seconds=0.5)
        assert drained == [None, None, None, {'kind': 'ours'}]
    finally:
        server.stop()
