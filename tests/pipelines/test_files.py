"""Files and directories: written whole or not at all."""

import json
import os
import pathlib
import shutil
import stat

import pytest

from infra import disk


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / 'summary.json'
    disk.write_json(path, {'frames': 1})
    with pytest.raises(ValueError):
        disk.write_json(path, {'frames': float('nan')})
    with pytest.raises(TypeError):
        disk.write_atomically(path, 3)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {'frames': 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_replace_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / 'summary.json'
    disk.write_json(path, {'frames': 1})

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        disk.write_json(path, {'frames': 2})
    assert json.loads(path.read_text()) == {'frames': 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('text', [None, '', '{"frames": 1', '[1]', '\x00'])
def test_what_is_no_json_object_reads_as_none(tmp_path, text):
    path = tmp_path / 'a.json'
    if text is not None:
        path.write_text(text)
    assert disk.read_json(path) is None


def test_what_was_written_is_read(tmp_path):
    disk.write_json(tmp_path / 'a.json', {'frames': 1})
    assert disk.read_json(tmp_path / 'a.json') == {'frames': 1}


@pytest.mark.parametrize('umask', [0o002, 0o022, 0o077])
def test_modes_follow_the_umask_and_a_setgid_directory(tmp_path, umask):
    tmp_path.chmod(0o2777)
    before = os.umask(umask)
    try:
        disk.write_json(tmp_path / 'a.json', {})
        with disk.replaced_directory(tmp_path / 'policy') as staging:
            (staging / 'variables').mkdir(mode=0o755)  # as TensorFlow does
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob('*')}
    directory = 0o2777 & ~umask
    expected = {'a.json': 0o666 & ~umask, 'policy': directory, 'variables': directory}
    assert modes == expected


def test_a_directory_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / 'policy'
    path.mkdir()
    (path / 'old').touch()
    with disk.replaced_directory(path) as staging:
        (staging / 'new').touch()
        assert [file.name for file in path.iterdir()] == ['old']
    assert [file.name for file in path.iterdir()] == ['new']
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_another_process_fills_is_no_leftover(tmp_path):
    path = tmp_path / 'policy'
    with disk.replaced_directory(path) as staging:
        (staging / 'new').touch()
        disk.remove_leftovers(tmp_path, 'policy')
    assert [file.name for file in path.iterdir()] == ['new']


def test_a_leftover_that_vanishes_meanwhile_is_no_error(tmp_path, monkeypatch):
    left = tmp_path / '.policy.0123456789ab'
    left.mkdir()
    monkeypatch.setattr(disk, '_is_filled', lambda _: left.rmdir())  # its process is done
    disk.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_is_put_where_none_is(tmp_path):
    one, other, place = (tmp_path / name for name in ('one', 'other', 'place'))
    one.write_text('one')
    other.write_text('other')
    disk.put_new(one, place)
    with pytest.raises(FileExistsError):
        disk.put_new(other, place)
    assert (place.read_text(), other.read_text(), one.exists()) == ('one', 'other', False)


def test_no_kill_finds_a_directory_gone_while_it_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / 'policy'
    path.mkdir()
    with disk.replaced_directory(path) as staging:
        (staging / 'new').touch()
        # It would be gone between two renames.
        monkeypatch.setattr(pathlib.Path, 'rename', lambda *_: pytest.fail('not in one step'))
    assert [file.name for file in path.iterdir()] == ['new']
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('gone', [True, False])
def test_a_replacement_killed_between_its_renames_is_completed(tmp_path, monkeypatch, gone):
    monkeypatch.setattr(disk, '_exchanged', lambda *_: False)  # as on NFS
    path = tmp_path / 'policy'
    with disk.replaced_directory(path) as staging:
        (staging / 'first').touch()
    with disk.replaced_directory(path) as staging:
        (staging / 'second').touch()
        left = tmp_path / '.policy.0123456789ab'
        left.mkdir()
        for name in ('before', 'new'):
            (left / name).mkdir()
            (left / name / name).touch()
    if gone:
        shutil.rmtree(path)
    disk.remove_leftovers(tmp_path)
    assert [file.name for file in path.iterdir()] == ['new' if gone else 'second']
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_stays_as_it_was_when_its_replacement_fails(tmp_path):
    path = tmp_path / 'policy'
    path.mkdir()
    (path / 'old').touch()
    with pytest.raises(OSError, match='full'), disk.replaced_directory(path) as staging:
        (staging / 'half').touch()
        raise OSError('full')
    assert [file.name for file in path.iterdir()] == ['old']
    assert list(tmp_path.iterdir()) == [path]
