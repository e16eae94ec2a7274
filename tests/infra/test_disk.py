"""Locks and numbered directories."""

import os
import subprocess
import sys
import threading

import pytest

from infra import disk
from tests.support.engines import ROOT


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


def test_a_killed_processs_directory_stays_locked_until_its_last_child_has_ended(tmp_path):
    child = 'import pathlib, sys, time; time.sleep(2.0); pathlib.Path(sys.argv[1]).touch()'
    program = (
        'import pathlib, sys, time\n'
        'from infra import disk\n'
        'from infra.process import ProcessSpec, SupervisedProcess\n'
        'path = pathlib.Path(sys.argv[1])\n'
        'lock = disk.lock(path, by_children=True)\n'
        f'argv = [sys.executable, "-c", {child!r}, str(path / "last")]\n'
        'SupervisedProcess(ProcessSpec("child", argv, path / "log")).start()\n'
        'print("held", flush=True)\n'
        'time.sleep(60)\n'
    )
    argv = [sys.executable, '-c', program, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b'held\n'
        holder.kill()
    assert disk.lock_holder(tmp_path) == holder.pid
    with pytest.raises(disk.InUseError, match='not running here, or by what it has started'):
        disk.lock(tmp_path)
    with disk.lock(tmp_path, by_children=True):
        assert (tmp_path / 'last').exists()


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
