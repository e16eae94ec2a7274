"""Manifests and counters that are not what was written are refused, whichever bit was flipped."""

import json
import resource
import signal

import numpy as np
import pytest

from infra.parameter_server import checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError, ShardState
from infra.sealed import parse_object, seal, unseal
from tests.support.flips import flipped, flips_of
from tests.support.parameter_servers import LAYOUT


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'[1]',
        b'{"frames": 1',
        b'{"game": "\xff' + b'x' * 5_000 + b'"}',
        b'{"game": "\\ud800"}',
        b'{"frames": NaN}',
        b'{"frames": 1e999}',
        b'{"frames": ' + b'9' * 5_000 + b'}',
        b'[' * 100_000,
        b'\x00',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_no_object_of_ours_is_one_short_line(content):
    with pytest.raises(ValueError, match='no JSON of ours') as refusal:
        parse_object(content)
    assert '\n' not in str(refusal.value)
    assert len(repr(refusal.value)) < 250


def test_what_was_sealed_comes_back_without_the_seal():
    values = {'updates': 3, 'replay': {'b': [1, 2.5], 'a': None}}
    assert unseal(json.loads(json.dumps(seal(values)))) == values


def test_an_object_of_an_earlier_version_is_taken_as_it_is():
    assert unseal({'updates': 3}) == {'updates': 3}


def test_any_flipped_bit_of_a_sealed_object_is_found():
    values = {'updates': 3, 'agent_steps': 12, 'rejected': {'stale': 0}}
    content = json.dumps(seal(values)).encode()
    for damaged in flipped(content, 1_000):
        try:
            found = unseal(json.loads(damaged))
        except (ValueError, AttributeError):
            continue
        # A letter of JSON may be written in another way, such as white space.
        assert found == values


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of one shard."""
    arrays = {name: np.ones(LAYOUT.size, np.float32) for name in ('parameters', 'target')}
    counters = {'version': 7, 'target_version': 4, 'agent_steps': 28, 'sessions': {'a': [1, 2]}}
    state = ShardState(LAYOUT, arrays, ('parameters', 'target'), counters)
    part = checkpoint.write_part(str(tmp_path), 0, 1, state)
    checkpoint.publish(str(tmp_path), 'adam', [part])
    return tmp_path


def _refusal(directory):
    """The message by which a checkpoint is refused, empty when it is not."""
    try:
        checkpoint.validate(str(directory))
    except DamagedCheckpointError as error:
        return str(error)
    return ''


def test_a_file_of_a_checkpoint_that_is_damaged_is_told_by_size_or_checksum(saved):
    (file,) = saved.glob('*.data-*')
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f'{len(whole) - 1} bytes instead of {len(whole)})' in _refusal(saved)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert _refusal(saved) == f'{file} is damaged (its content has changed)'


def test_a_full_disk_is_told_by_the_systems_own_words(saved, tmp_path):
    state = checkpoint.read_state(str(saved), 0, 1, 'adam')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # bytes
        with pytest.raises(OSError, match=': File too large$'):
            checkpoint.write_part(str(tmp_path / 'full'), 0, 1, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('kind', ['manifest.json', '*.index', '*.data-*'])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused_in_one_line(saved, kind):
    (file,) = saved.glob(kind)
    whole = checkpoint.validate(str(saved))
    for _ in flips_of(file):
        refusal = _refusal(saved)
        # What is still the same to a reader of JSON, such as other white space, is no damage.
        assert '\n' not in refusal
        assert refusal or checkpoint.validate(str(saved)) == whole
    assert checkpoint.read_checkpoint(str(saved)).clock == {'updates': 7, 'agent_steps': 28}


@pytest.mark.parametrize(
    'changes',
    [
        {'parts': []},
        {'parts': 3},
        {'parts': [{}]},
        {'optimizer': 1},
        {'layout': []},
        {'layout': {'names': ['a'], 'shapes': [['x']]}},
    ],
    ids=repr,
)
def test_a_manifest_that_is_json_but_not_ours_is_refused_in_one_line(saved, changes):
    file = saved / 'manifest.json'
    manifest = unseal(json.loads(file.read_text()))
    file.write_text(json.dumps({**manifest, **changes}))  # as an earlier version: without a seal
    with pytest.raises(DamagedCheckpointError, match='is damaged'):
        checkpoint.validate(str(saved))


@pytest.mark.parametrize('changes', [{'arrays': ['nosuch']}, {'prefix': 'another'}], ids=repr)
def test_a_manifest_of_what_its_files_do_not_hold_is_refused_in_one_line(saved, changes):
    file = saved / 'manifest.json'
    manifest = unseal(json.loads(file.read_text()))
    parts = [{**part, **changes} for part in manifest['parts']]
    file.write_text(json.dumps({**manifest, 'parts': parts}))
    with pytest.raises(DamagedCheckpointError, match='cannot be read$') as refusal:
        checkpoint.require_usable(str(saved))
    assert '\n' not in str(refusal.value)


@pytest.fixture
def not_finite():
    """A state of a version that kept what overflowed."""
    arrays = {name: np.full(LAYOUT.size, np.nan, np.float32) for name in ('parameters', 'target')}
    counters = {'version': 7, 'target_version': 4, 'agent_steps': 28, 'sessions': {}}
    return ShardState(LAYOUT, arrays, ('parameters', 'target'), counters)


def test_a_state_that_is_not_finite_is_not_written(tmp_path, not_finite):
    with pytest.raises(ValueError, match='parameters of shard-00000-of-00001 is not finite'):
        checkpoint.write_part(str(tmp_path / 'new'), 0, 1, not_finite)
    assert not (tmp_path / 'new').exists()


def test_a_checkpoint_that_is_not_finite_is_not_loaded(tmp_path, not_finite, monkeypatch):
    with monkeypatch.context() as earlier:  # versions that wrote whatever they held
        earlier.setattr(checkpoint, '_require_finite', lambda *_: None)
        part = checkpoint.write_part(str(tmp_path), 0, 1, not_finite)
    checkpoint.publish(str(tmp_path), 'adam', [part])
    with pytest.raises(DamagedCheckpointError, match='parameters of shard-00000-of-00001'):
        checkpoint.read_checkpoint(str(tmp_path))
