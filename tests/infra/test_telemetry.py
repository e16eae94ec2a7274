"""Telemetry: what goes in comes out, and nothing that goes wrong stops the writer."""

import time

import numpy as np
import pytest
import reverb

from infra import telemetry as telemetry_lib
from infra.telemetry import Telemetry, TelemetryReader, build_table
from tests.support.waiting import eventually


@pytest.fixture
def address():
    server = reverb.Server([build_table()])
    yield f'localhost:{server.port}'
    server.stop()


def drain(reader, count, timeout_seconds=15.0):
    """At least `count` records, or what came within the time."""
    deadline = time.monotonic() + timeout_seconds
    records: list[dict] = []
    while len(records) < count and time.monotonic() < deadline:
        records += reader.drain(0.5)
    return records


def test_records_come_out_in_order_with_their_stamp(address):
    before = time.time()
    with Telemetry(address, 'actor', 3) as telemetry, TelemetryReader(address) as reader:
        telemetry.record('episode', raw_return=np.float32(-21), lengths=np.arange(2))
        telemetry.record('heartbeat')
        assert telemetry.flush()
        episode, heartbeat = drain(reader, 2)
    assert episode['kind'] == 'episode'
    assert episode['raw_return'] == -21.0
    assert episode['lengths'] == [0, 1]
    assert (episode['component'], episode['worker']) == ('actor', 3)
    assert before <= episode['time'] <= heartbeat['time'] <= time.time()
    assert heartbeat['kind'] == 'heartbeat'
    assert heartbeat['session'] == episode['session']


def test_a_restarted_worker_has_another_session(address):
    with TelemetryReader(address) as reader:
        for _ in range(2):
            with Telemetry(address, 'actor', 0) as telemetry:
                telemetry.record('heartbeat')
        sessions = {record['session'] for record in drain(reader, 2)}
    assert len(sessions) == 2


def test_records_are_sent_without_a_flush(address):
    with Telemetry(address, 'learner', 0) as telemetry, TelemetryReader(address) as reader:
        telemetry.record('learner', loss=0.5)
        assert [record['loss'] for record in drain(reader, 1)] == [0.5]


def test_many_writers_share_the_queue(address):
    writers = [Telemetry(address, 'actor', i) for i in range(4)]
    with TelemetryReader(address) as reader:
        for i, telemetry in enumerate(writers):
            for _ in range(25):
                telemetry.record('episode', i=i)
        for telemetry in writers:
            telemetry.close()
        records = drain(reader, 100)
    assert [sum(record['i'] == i for record in records) for i in range(4)] == [25] * 4


def test_closing_sends_what_waits(address):
    with TelemetryReader(address) as reader:
        with Telemetry(address, 'actor', 0) as telemetry:
            telemetry.record('last')
        assert [record['kind'] for record in drain(reader, 1)] == ['last']
    assert telemetry.dropped == 0


def test_draining_an_empty_queue_ends_after_its_time(address):
    with TelemetryReader(address) as reader:
        start = time.monotonic()
        assert reader.drain(0.3) == []
        assert 0.3 <= time.monotonic() - start < 2


def test_without_a_server_nothing_blocks_and_drops_are_counted(monkeypatch):
    monkeypatch.setattr(telemetry_lib, 'MAX_PENDING_RECORDS', 10)
    start = time.monotonic()
    with Telemetry('localhost:1', 'actor', 0) as telemetry:
        for i in range(25):
            telemetry.record('episode', i=i)
        assert telemetry.dropped == 15  # the oldest
        assert not telemetry.flush()
    assert telemetry.dropped == 25  # nobody took the rest either
    assert time.monotonic() - start < 8


def test_a_reader_without_a_server_is_bounded():
    start = time.monotonic()
    with TelemetryReader('localhost:1') as reader:
        assert reader.drain(0.2) == []
    assert time.monotonic() - start < 8


def test_a_reader_knows_whether_it_hears(monkeypatch):
    monkeypatch.setattr(telemetry_lib, '_DEAF_SECONDS', 1.5)
    server = reverb.Server([build_table()])
    with TelemetryReader(f'localhost:{server.port}') as reader:
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            assert reader.hears  # nobody tells anything
            time.sleep(0.1)
        server.stop()
        assert eventually(lambda: not reader.hears)


def test_a_full_queue_blocks_nobody(monkeypatch):
    monkeypatch.setattr(telemetry_lib, 'QUEUE_ITEMS', 2)
    server = reverb.Server([build_table()])
    try:
        with Telemetry(f'localhost:{server.port}', 'actor', 0) as telemetry:
            sent = []
            start = time.monotonic()
            for i in range(5):
                telemetry.record('episode', i=i)
                sent.append(telemetry.flush())
            # Two items fit; the next waits for room until a flush gives up.
            assert sent[:2] == [True, True]
            assert not any(sent[2:])
            assert time.monotonic() - start < 8
            with TelemetryReader(f'localhost:{server.port}') as reader:
                # Read, the queue takes the rest: nothing was lost.
                assert [record['i'] for record in drain(reader, 5)] == [0, 1, 2, 3, 4]
    finally:
        server.stop()


def test_a_writer_finds_a_server_that_comes_later():
    import portpicker

    port = portpicker.pick_unused_port()
    with Telemetry(f'localhost:{port}', 'actor', 0) as telemetry:
        telemetry.record('early')
        assert not telemetry.flush()
        server = reverb.Server([build_table()], port=port)
        try:
            with TelemetryReader(f'localhost:{port}') as reader:
                assert [record['kind'] for record in drain(reader, 1)] == ['early']
        finally:
            server.stop()
