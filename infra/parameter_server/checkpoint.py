"""Checkpoints: shard states in, a directory of parts with one manifest out, and back.

Each shard's part is a `tf.train.Checkpoint`. The client that saves writes the manifest last; it
lists every file with its size and checksum. A directory without a manifest is not a checkpoint. A
checkpoint can be restored into any number of shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from infra.disk import by_descriptor, scratch, sync, write_atomically
from infra.parameter_server.layout import Layout
from infra.sealed import parse_object, seal, unseal

MANIFEST = 'manifest.json'
"""File written last."""
AVERAGE = 'average'
"""Name of the parameters' moving average, which some runs keep."""
_FORMAT = 1
_READ_BYTES = 1 << 20
_REASON_LENGTH = 200


class DamagedCheckpointError(ValueError):
    """A file of the checkpoint is missing, changed or unreadable; the remedy is the caller's."""


class CheckpointMismatchError(ValueError):
    """The checkpoint is intact but belongs to another optimizer or another shard."""


@dataclasses.dataclass(frozen=True)
class ShardState:
    """A copy of a shard's complete state.

    Attributes:
      layout: of the whole network.
      arrays: float32 arrays by name: 'parameters', 'target', slots [n] and scalars [].
      slots: names of the arrays [n], including 'parameters' and 'target'.
      counters: version, target_version, agent_steps, sessions and the values of `RunControl`.
    """

    layout: Layout
    arrays: dict[str, np.ndarray]
    slots: tuple[str, ...]
    counters: dict[str, Any]


class Checkpoint(NamedTuple):
    """A whole network, for exports and evaluations.

    Attributes:
      layout: of the network.
      parameters: float32 [layout.size], the newest.
      average: float32 [layout.size], the moving average of the parameters, for evaluations and
        exports; equal to `parameters` if the run keeps none.
      target: float32 [layout.size], the target network.
      clock: {'updates': int, 'agent_steps': int}, of shard 0.
    """

    layout: Layout
    parameters: np.ndarray
    average: np.ndarray
    target: np.ndarray
    clock: dict[str, int]


def write_part(directory: str, shard: int, num_shards: int, state: ShardState) -> dict[str, Any]:
    """Writes one shard's files and returns its entry of the manifest.

    Raises:
      OSError: the directory is not writable.
      ValueError: an array is not finite; no file is written.
    """
    import tensorflow as tf

    prefix = _prefix(shard, num_shards)
    _require_finite(prefix, state)
    os.makedirs(directory, exist_ok=True)
    with tf.device('cpu'):
        variables = {name: tf.Variable(array) for name, array in state.arrays.items()}
    try:
        tf.train.Checkpoint(**variables).write(os.path.join(directory, prefix))
    except tf.errors.OpError as error:
        # TensorFlow's message lists its nodes first and gives the system's error last.
        reason = error.message.splitlines()[0].split(' [Op:')[0].rpartition('; ')[2]
        raise OSError(
            f'cannot write the checkpoint to {directory}: {reason[-_REASON_LENGTH:]}'
        ) from error
    files = sorted(pathlib.Path(directory).glob(f'{prefix}.*'))
    _sync(files)
    return {
        'prefix': prefix,
        'layout': state.layout.to_json(),
        'slots': list(state.slots),
        'arrays': sorted(state.arrays),
        'counters': state.counters,
        'files': {file.name: _describe(file) for file in files},
    }


def holds_part(directory: str, shard: int, num_shards: int) -> bool:
    """Whether a directory has a checkpoint, or this shard's part of one."""
    prefix = _prefix(shard, num_shards)
    return is_published(directory) or any(pathlib.Path(directory).glob(f'{prefix}.*'))


def _require_finite(prefix: str, state: ShardState) -> None:
    """Raises ValueError unless every array of the state is finite."""
    for name, array in state.arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f'{name} of {prefix} is not finite: the checkpoint before is kept')


def _sync(files: Iterable[pathlib.Path]) -> None:
    """Makes the files survive a power cut."""
    for file in files:
        with open(file, 'rb') as stream:
            os.fsync(stream.fileno())


def packed_part(shard: int, num_shards: int, state: ShardState) -> tuple[dict[str, Any], bytes]:
    """Returns one shard's entry of the manifest and its files as a tar archive.

    The client unpacks the archive in a directory that the shard cannot reach.

    Raises:
      OSError: the temporary directory is full or not writable.
    """
    archive = io.BytesIO()
    with scratch() as directory:
        part = write_part(str(directory), shard, num_shards, state)
        with tarfile.open(fileobj=archive, mode='w') as tar:
            for name in part['files']:
                tar.add(directory / name, name)
    return part, archive.getvalue()


def unpack_part(directory: str, archive: bytes) -> None:
    """Writes the files of `packed_part` to a directory; their modes follow this process's umask.

    Raises:
      OSError: the directory is not writable.
    """
    os.makedirs(directory, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter=_without_mode)
        files = [pathlib.Path(directory, name) for name in tar.getnames()]
    _sync(files)


def _without_mode(entry: tarfile.TarInfo, directory: str) -> tarfile.TarInfo:
    # Typeshed does not declare None, which leaves the mode to the umask.
    return tarfile.data_filter(entry, directory).replace(mode=None)  # type: ignore[arg-type]


def publish(directory: str, optimizer: str, parts: list[dict[str, Any]]) -> None:
    """Writes the manifest, which makes the directory a checkpoint."""
    manifest = {
        'format': _FORMAT,
        'optimizer': optimizer,
        'layout': parts[0]['layout'],
        'parts': [{key: part[key] for key in part if key != 'layout'} for part in parts],
    }
    write_atomically(pathlib.Path(directory, MANIFEST), json.dumps(seal(manifest)))
    sync(directory)


def is_published(directory: str) -> bool:
    """Whether the directory has a manifest; its files may still be damaged."""
    return pathlib.Path(directory, MANIFEST).exists()


def validate(directory: str) -> dict[str, Any]:
    """Checks every file against the manifest and returns the manifest.

    Raises:
      DamagedCheckpointError: a file is missing or changed; the message names it.
    """
    manifest, files = _read_manifest(directory)
    for name, expected in files.items():
        _check_file(pathlib.Path(directory, name), expected)
    return manifest


def read_clock(directory: str) -> dict[str, int]:
    """The clock of a checkpoint, as in `Checkpoint`; does not check its other files.

    Raises:
      DamagedCheckpointError: the manifest is missing or damaged.
    """
    return _clock(_read_manifest(directory)[0])


def _clock(manifest: dict[str, Any]) -> dict[str, int]:
    counters = manifest['parts'][0]['counters']
    return {'updates': counters['version'], 'agent_steps': counters['agent_steps']}


def _read_manifest(directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest, and the expected size and checksum of each file.

    Raises:
      DamagedCheckpointError: it is missing or damaged.
    """
    path = pathlib.Path(directory, MANIFEST)
    try:
        manifest = unseal(parse_object(path.read_bytes()))
        if manifest['format'] != _FORMAT:
            raise DamagedCheckpointError(
                f'{path} has format {manifest["format"]}; this version reads {_FORMAT}'
            )
        Layout(**manifest['layout'])
        files = _files_of(manifest)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f'{path} is missing: no checkpoint was completed there'
        ) from None
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedCheckpointError(
            f'{path} is damaged ({type(error).__name__}: {error})'
        ) from error
    return manifest, files


def require_usable(directory: str) -> None:
    """Validates the files and reads every array, which takes 0.2 s for Nature's network.

    Raises:
      DamagedCheckpointError: a file is missing or changed, or an array is unreadable or not finite;
        the message names it.
    """
    for part in validate(directory)['parts']:
        for name in part['arrays']:
            _read_array(directory, part, name)


def _files_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Maps each file name of a manifest to the expected size and checksum.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: the manifest is malformed.
    """
    if not isinstance(manifest['optimizer'], str) or not manifest['parts']:
        raise ValueError('it names no optimizer, or no parts')
    files: dict[str, Any] = {}
    for part in manifest['parts']:
        for name in ('version', 'target_version', 'agent_steps'):
            if type(part['counters'][name]) is not int or part['counters'][name] < 0:
                raise ValueError(f'its {name} is no count')
        part['counters']['sessions'].items()
        for name in (part['prefix'], *part['files'], *part['arrays'], *part['slots']):
            if not isinstance(name, str) or os.path.basename(name) != name:
                raise ValueError(f'{name!r:.40} is no name')
        for name, expected in part['files'].items():
            files[name] = {key: expected[key] for key in ('bytes', 'sha256')}
    return files


def read_state(directory: str, shard: int, num_shards: int, optimizer: str) -> ShardState:
    """Returns the state of one shard out of `num_shards`, from any number of saved parts.

    Scalars and counters come from the part that holds the shard's first element. Only the version
    is the newest of all parts, because an asynchronous run saves them a few updates apart.

    Raises:
      DamagedCheckpointError: see `validate`.
      CheckpointMismatchError: the checkpoint was made with another optimizer.
    """
    manifest = validate(directory)
    _require_optimizer(directory, manifest, optimizer)
    layout = Layout(**manifest['layout'])
    wanted = layout.slices(num_shards)[shard]
    parts = manifest['parts']
    bounds = layout.slices(len(parts))
    first = next(i for i, part in enumerate(bounds) if part.start <= wanted.start < part.stop)
    arrays = {
        name: _gather(directory, manifest, name, wanted)
        if name in parts[first]['slots']
        else _read_array(directory, parts[first], name)
        for name in parts[first]['arrays']
        if name != AVERAGE or _has_average(manifest)
    }
    version = max(part['counters']['version'] for part in parts)
    counters = {**parts[first]['counters'], 'version': version}
    if len(parts) != num_shards:
        # Sequences count messages to one shard, so they are void for another number of shards.
        counters['sessions'] = {}
    slots = tuple(name for name in parts[first]['slots'] if name in arrays)
    return ShardState(layout, arrays, slots, counters)


def read_only_part(directory: str, shard: int, num_shards: int, optimizer: str) -> ShardState:
    """Returns the state of a shard that published its part alone.

    Raises:
      DamagedCheckpointError: see `validate`.
      CheckpointMismatchError: the state belongs to another shard or another optimizer.
    """
    manifest = validate(directory)
    _require_optimizer(directory, manifest, optimizer)
    part = manifest['parts'][0]
    if part['prefix'] != _prefix(shard, num_shards):
        raise CheckpointMismatchError(
            f'{directory} holds {part["prefix"]}, this is {_prefix(shard, num_shards)}. Fix: give'
            ' each shard its own directory, and a new experiment an empty one.'
        )
    arrays = {name: _read_array(directory, part, name) for name in part['arrays']}
    layout = Layout(**manifest['layout'])
    return ShardState(layout, arrays, tuple(part['slots']), part['counters'])


def _prefix(shard: int, num_shards: int) -> str:
    return f'shard-{shard:05d}-of-{num_shards:05d}'


def _require_optimizer(directory: str, manifest: dict[str, Any], optimizer: str) -> None:
    if manifest['optimizer'] != optimizer:
        raise CheckpointMismatchError(
            f'{directory} was made with --optimizer={manifest["optimizer"]}, not {optimizer}. '
            f'Fix: use --optimizer={manifest["optimizer"]} or another checkpoint.'
        )


def read_checkpoint(directory: str) -> Checkpoint:
    """Reads the whole network, for an export or an evaluation.

    Raises:
      DamagedCheckpointError: see `validate`.
    """
    manifest = validate(directory)
    layout = Layout(**manifest['layout'])
    parameters, target = (
        _gather(directory, manifest, name, slice(0, layout.size))
        for name in ('parameters', 'target')
    )
    average = parameters
    if _has_average(manifest):
        average = _gather(directory, manifest, AVERAGE, slice(0, layout.size))
    return Checkpoint(layout, parameters, average, target, _clock(manifest))


def _has_average(manifest: dict[str, Any]) -> bool:
    """Whether every part has one; while shards restart with another setting, some may."""
    return all(AVERAGE in part['slots'] for part in manifest['parts'])


def _gather(directory: str, manifest: dict, name: str, wanted: slice) -> np.ndarray:
    """Returns the elements `wanted` of a slot, float32, from all parts that hold some of them."""
    parts = manifest['parts']
    pieces = []
    for part, bounds in zip(parts, Layout(**manifest['layout']).slices(len(parts))):
        start, stop = max(wanted.start, bounds.start), min(wanted.stop, bounds.stop)
        if start < stop:
            array = _read_array(directory, part, name)
            pieces.append(array[start - bounds.start : stop - bounds.start])
    return np.concatenate(pieces)


def _read_array(directory: str, part: dict, name: str) -> np.ndarray:
    import tensorflow as tf

    try:
        with by_descriptor(directory) as path:
            reader = tf.train.load_checkpoint(os.path.join(path, part['prefix']))
            array = np.asarray(reader.get_tensor(f'{name}/.ATTRIBUTES/VARIABLE_VALUE'), np.float32)
    except (tf.errors.OpError, OSError, ValueError) as error:  # ValueError: no file of that prefix
        raise DamagedCheckpointError(
            f'{directory}: {name} of {part["prefix"]} cannot be read'
        ) from error
    if not np.isfinite(array).all():
        raise DamagedCheckpointError(f'{directory}: {name} of {part["prefix"]} is not finite')
    return array


def _describe(file: pathlib.Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, 'rb') as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return {'bytes': file.stat().st_size, 'sha256': digest.hexdigest()}


def _check_file(file: pathlib.Path, expected: dict[str, Any]) -> None:
    try:
        found = _describe(file)
    except OSError as error:
        raise DamagedCheckpointError(f'{file} cannot be read ({error.strerror})') from None
    if found != expected:
        is_cut = found['bytes'] != expected.get('bytes')
        what = (
            f'{found["bytes"]} bytes instead of {expected.get("bytes")}'
            if is_cut
            else 'its content has changed'
        )
        raise DamagedCheckpointError(f'{file} is damaged ({what})')
