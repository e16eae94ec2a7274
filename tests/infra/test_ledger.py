"""The ledger: what an element need not do again, over commits, repetitions and restarts."""

from typing import Any

import numpy as np
import pytest

from infra.parameter_server import ledger as ledger_lib
from infra.parameter_server.ledger import Ledger
from infra.parameter_server.protocol import RequestRefusedError
from tests.support.parameter_servers import LAYOUT, config, connect, serve


def test_an_element_that_runs_again_finds_the_segments_that_are_finished():
    ledger = Ledger()
    assert ledger.begin('actor', 0, committed=0) == (0, [])
    for segment in range(3):
        ledger.finish('actor', 0, 0, segment, f'record {segment}')
    ledger.finish('actor', 0, 0, 1, 'a repetition')
    assert ledger.begin('actor', 0, committed=0) == (0, ['record 0', 'record 1', 'record 2'])
    assert ledger.begin('actor', 1, committed=0) == (0, [])
    assert ledger.begin('learner', 0, committed=0) == (0, [])


def test_what_the_engine_has_committed_is_dropped_and_its_number_kept():
    ledger = Ledger()
    for segment in range(3):
        ledger.finish('actor', 0, 0, segment, f'record {segment}')
    assert ledger.begin('actor', 0, committed=2) == (2, ['record 2'])
    # A job that the launcher submits anew begins at 0.
    assert ledger.begin('actor', 0, committed=0) == (2, ['record 2'])
    ledger.commit_all()
    assert ledger.begin('actor', 0, committed=0) == (3, [])


def test_a_shard_that_restarts_older_asks_for_the_records_that_it_lacks():
    ledger = Ledger()
    assert ledger.finish('actor', 0, 0, 0, 'record 0') == 1
    assert ledger.finish('actor', 0, 0, 5, 'record 5') == 1  # not before 1 to 4
    for segment in range(1, 6):
        assert ledger.finish('actor', 0, 0, segment, f'record {segment}') == segment + 1
    assert ledger.begin('actor', 0, committed=0) == (0, [f'record {i}' for i in range(6)])


def test_a_shard_that_restarts_older_than_what_is_committed_begins_behind_it():
    ledger = Ledger()
    ledger.finish('actor', 0, 0, 0, 'record 0')
    assert ledger.finish('actor', 0, 4, 5, 'record 5') == 4  # 0 to 3 are committed
    assert ledger.begin('actor', 0, committed=4) == (4, [])


def test_a_restored_ledger_is_the_saved_one():
    ledger, restored = Ledger(), Ledger()
    ledger.finish('actor', 0, 0, 0, 'a')
    ledger.finish('learner', 3, 0, 0, 'b')
    ledger.begin('learner', 3, committed=1)
    restored.restore(ledger.counters())
    assert restored.begin('actor', 0, committed=0) == (0, ['a'])
    assert restored.begin('learner', 3, committed=0) == (1, [])


def test_its_size_is_bounded_and_it_drops_whole_blocks_and_counts_them(monkeypatch):
    monkeypatch.setattr(ledger_lib, 'MAX_BYTES', 45)
    monkeypatch.setattr(ledger_lib, 'MAX_WORKERS', 2)
    monkeypatch.setattr(ledger_lib, 'BLOCK_SEGMENTS', 2)
    ledger = Ledger()
    ledger.finish('learner', 0, 0, 0, 'x')
    ledger.begin('actor', 0, committed=1)
    for segment in range(1, 6):
        ledger.finish('actor', 0, 1, segment, '0123456789')
    # 45 bytes hold the learner's record and four of the actor's; the first ends its block.
    assert ledger.begin('actor', 0, committed=1) == (2, ['0123456789'] * 4)
    ledger.finish('actor', 0, 1, 6, '0123456789')
    assert ledger.begin('actor', 0, committed=1) == (4, ['0123456789'] * 3)
    assert ledger.dropped == 1 + 2
    ledger.finish('actor', 1, 0, 0, 'y')
    assert len(ledger.counters()) == 2
    with pytest.raises(ValueError, match='a record of 262145 characters'):
        ledger.finish('actor', 0, 0, 7, 'x' * (ledger_lib.MAX_RECORD_BYTES + 1))


def test_a_checkpoint_holds_it():
    with serve(config()) as servers, connect([each.address for each in servers]) as client:
        client.initialise(np.zeros(LAYOUT.size))
        assert client.finish_segment('actor', 2, 0, 0, 'record') == 1
        state = servers[0].shard.snapshot()
        client.commit_segments()
        assert client.begin_segments('actor', 2, 0) == (1, [])
        servers[0].shard.restore(state)
        assert client.begin_segments('actor', 2, 0) == (0, ['record'])


def test_what_is_no_segment_is_refused():
    with serve(config()) as servers, connect([each.address for each in servers]) as client:
        good: dict[str, Any] = {
            'kind': 'actor',
            'worker': 0,
            'first': 0,
            'segment': 0,
            'record': 'x',
        }
        bad = (('worker', -1), ('first', -1), ('segment', 1.5), ('record', None), ('kind', 'boss'))
        for name, value in bad:
            with pytest.raises(RequestRefusedError):
                client.finish_segment(**{**good, name: value})
        assert client.begin_segments('actor', 0, 0) == (0, [])
