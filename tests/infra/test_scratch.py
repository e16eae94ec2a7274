"""Temporary directories: what a kill left is removed, what is in use or of others is not."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from infra import disk
from infra.disk import own_temporary_files, scratch


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary directories are made."""
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.delenv('TMPDIR', raising=False)
    return tmp_path


def test_a_temporary_directory_is_gone_behind_its_block(temporary):
    with scratch() as directory:
        (directory / 'part').write_text('half')
        assert directory.parent == temporary
    assert list(temporary.iterdir()) == []


def test_what_a_killed_child_leaves_goes_with_the_temporary_files_of_its_parent(temporary):
    program = 'import os, tempfile; tempfile.mkdtemp(); tempfile.mkstemp(); os.abort()'
    with own_temporary_files() as directory:
        subprocess.run([sys.executable, '-c', program], timeout=60)
        with tempfile.NamedTemporaryFile() as file:
            assert pathlib.Path(file.name).parent == directory
        assert len([path for path in directory.iterdir() if path.name != '.lock']) == 2
    assert list(temporary.iterdir()) == []
    assert (tempfile.gettempdir(), os.environ.get('TMPDIR')) == (str(temporary), None)


def test_what_a_killed_process_left_is_removed_and_nothing_else(temporary, monkeypatch):
    program = (
        'import os\nfrom infra.disk import scratch\n'
        'with scratch() as directory:\n'
        '    (directory / "part").write_text("half")\n'
        '    os.kill(os.getpid(), 9)\n'
    )
    environment = {**os.environ, 'TMPDIR': str(temporary)}
    subprocess.run([sys.executable, '-c', program], env=environment, timeout=30)
    (left,) = temporary.iterdir()
    mine = temporary / 'gorila-of-a-user'
    mine.mkdir()
    with scratch() as young:  # the other one may be about to be held
        assert left.exists()
        monkeypatch.setattr(disk, '_SCRATCH_SECONDS', -1.0)
        with scratch() as other:
            assert sorted(temporary.iterdir()) == sorted([mine, young, other])
