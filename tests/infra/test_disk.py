"""Locks and numbered directories."""

import os
import threading

import pytest

from infra import disk


def test_reading_who_holds_a_lock_makes_no_lock_fail(tmp_path):
    stop = threading.Event()

    def read():
        while not stop.is_set():
            disk.lock_holder(tmp_path)

    disk.lock(tmp_path).close()
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(200):
            disk.lock(tmp_path).close()
    finally:
        stop.set()
        reader.join()


def test_a_second_lock_names_the_process_of_the_first(tmp_path):
    with disk.lock(tmp_path):
        assert disk.lock_holder(tmp_path) == os.getpid()
        with pytest.raises(disk.InUseError, match=f'in use by process {os.getpid()}'):
            disk.lock(tmp_path)
    assert disk.lock_holder(tmp_path) is None


def test_the_next_number_is_above_those_set_aside(tmp_path):
    states = disk.Generations(tmp_path, 'state')
    for _ in range(2):
        states.next().mkdir()
    disk.set_aside(states.paths()[0])
    assert [path.name for path in states.paths()] == ['state-00000001']
    assert states.next().name == 'state-00000003'


def test_what_cannot_be_removed_stops_no_removal(tmp_path):
    (tmp_path / 'b').mkdir()
    disk.remove([tmp_path / 'a', tmp_path / 'b'])
    assert list(tmp_path.iterdir()) == []
