"""Checkpoints: shard states in, a directory of parts with one manifest out, and back.

Each shard writes its part with `tf.train.Checkpoint`; the manifest, written last by whoever asked
for the checkpoint, names every file with its size and checksum. A directory without a manifest is
not a checkpoint. A checkpoint can be restored into any number of shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from infra.directories import sync
from infra.parameter_server.layout import Layout

_MANIFEST = 'manifest.json'
_FORMAT = 1
_READ_BYTES = 1 << 20
_REASON_LENGTH = 200


class DamagedCheckpointError(ValueError):
    """A file of the checkpoint is missing or is not what was written."""


class CheckpointMismatchError(ValueError):
    """The checkpoint is sound but was made with another optimizer, or by another shard."""


@dataclasses.dataclass(frozen=True)
class ShardState:
    """A copy of everything a shard would need to go on.

    Attributes:
      layout: of the whole network.
      arrays: float32 arrays by name: 'parameters', 'target', slots [n] and scalars [].
      slots: names of the arrays that are as wide as the parameters, 'target' included.
      counters: version, target_version, agent_steps, and the sessions.
    """

    layout: Layout
    arrays: dict[str, np.ndarray]
    slots: tuple[str, ...]
    counters: dict[str, Any]


class Checkpoint(NamedTuple):
    """What exports and evaluations need.

    Attributes:
      layout: of the network.
      parameters: float32 [layout.size].
      target: float32 [layout.size], the target network.
      clock: {'updates': int, 'agent_steps': int}, of shard 0.
    """

    layout: Layout
    parameters: np.ndarray
    target: np.ndarray
    clock: dict[str, int]


def write_part(directory: str, shard: int, num_shards: int, state: ShardState) -> dict[str, Any]:
    """Writes one shard's files and returns its entry of the manifest.

    Raises:
      OSError: the directory cannot be written.
    """
    import tensorflow as tf

    os.makedirs(directory, exist_ok=True)
    prefix = _prefix(shard, num_shards)
    with tf.device('cpu'):
        variables = {name: tf.Variable(array) for name, array in state.arrays.items()}
    try:
        tf.train.Checkpoint(**variables).write(os.path.join(directory, prefix))
    except tf.errors.OpError as error:
        # The first part of TensorFlow's message lists its nodes.
        reason = error.message.split(' [Op:')[0].splitlines()[0][-_REASON_LENGTH:]
        raise OSError(f'cannot write the checkpoint to {directory}: {reason}') from error
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


def _sync(files: Iterable[pathlib.Path]) -> None:
    """Makes the files survive a power cut."""
    for file in files:
        with open(file, 'rb') as stream:
            os.fsync(stream.fileno())


def packed_part(shard: int, num_shards: int, state: ShardState) -> tuple[dict[str, Any], bytes]:
    """One shard's entry of the manifest, and its files as a tar archive, for a directory elsewhere.

    Raises:
      OSError: there is no room for them in the temporary directory.
    """
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as directory:
        part = write_part(directory, shard, num_shards, state)
        with tarfile.open(fileobj=archive, mode='w') as tar:
            for name in part['files']:
                tar.add(os.path.join(directory, name), name)
    return part, archive.getvalue()


def unpack_part(directory: str, archive: bytes) -> None:
    """Writes the files of `packed_part` to a directory.

    Raises:
      OSError: it cannot be written.
    """
    os.makedirs(directory, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter='data')
        files = [pathlib.Path(directory, name) for name in tar.getnames()]
    _sync(files)


def publish(directory: str, optimizer: str, parts: list[dict[str, Any]]) -> None:
    """Writes the manifest, which makes the directory a checkpoint."""
    manifest = {
        'format': _FORMAT,
        'optimizer': optimizer,
        'layout': parts[0]['layout'],
        'parts': [{key: part[key] for key in part if key != 'layout'} for part in parts],
    }
    path = pathlib.Path(directory, _MANIFEST)
    temporary = path.with_name(f'.{_MANIFEST}.{os.getpid()}')
    with open(temporary, 'w') as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(directory)


def is_published(directory: str) -> bool:
    """Whether the directory holds a complete checkpoint (its files may still be damaged)."""
    return pathlib.Path(directory, _MANIFEST).exists()


def validate(directory: str) -> dict[str, Any]:
    """Checks every file against the manifest and returns the manifest.

    Raises:
      DamagedCheckpointError: naming the file that is missing or changed.
    """
    path = pathlib.Path(directory, _MANIFEST)
    try:
        manifest = json.loads(path.read_bytes())
        files = {
            name: expected for part in manifest['parts'] for name, expected in part['files'].items()
        }
        if manifest['format'] != _FORMAT:
            raise DamagedCheckpointError(
                f'{path} has format {manifest["format"]}; this version reads {_FORMAT}'
            )
        Layout(**manifest['layout'])
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f'{path} is missing: no checkpoint was completed there; use another one'
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(f'{path} is damaged ({error!r}); use another one') from error
    for name, expected in files.items():
        _check_file(pathlib.Path(directory, name), expected)
    return manifest


def read_state(directory: str, shard: int, num_shards: int, optimizer: str) -> ShardState:
    """Returns the state of one shard out of `num_shards`, whatever number was saved.

    Scalars and counters come from the part that holds the shard's first element: parts of one
    asynchronous run may differ by a few updates.

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
    }
    counters = dict(parts[first]['counters'])
    if len(parts) != num_shards:
        # Sequences count messages to one shard; with other shards every client is a new one.
        counters['sessions'] = {}
    return ShardState(layout, arrays, tuple(parts[first]['slots']), counters)


def read_only_part(directory: str, shard: int, num_shards: int, optimizer: str) -> ShardState:
    """Returns the state of the one shard that published its part by itself.

    Raises:
      DamagedCheckpointError: see `validate`.
      CheckpointMismatchError: it is another shard's, or was made with another optimizer.
    """
    manifest = validate(directory)
    _require_optimizer(directory, manifest, optimizer)
    part = manifest['parts'][0]
    if part['prefix'] != _prefix(shard, num_shards):
        raise CheckpointMismatchError(
            f'{directory} holds {part["prefix"]}, this is {_prefix(shard, num_shards)}; give each'
            ' shard a directory of its own, and a new experiment an empty one'
        )
    arrays = {name: _read_array(directory, part, name) for name in part['arrays']}
    layout = Layout(**manifest['layout'])
    return ShardState(layout, arrays, tuple(part['slots']), part['counters'])


def _prefix(shard: int, num_shards: int) -> str:
    return f'shard-{shard:05d}-of-{num_shards:05d}'


def _require_optimizer(directory: str, manifest: dict[str, Any], optimizer: str) -> None:
    if manifest['optimizer'] != optimizer:
        raise CheckpointMismatchError(
            f'{directory} was made with optimizer={manifest["optimizer"]}, not {optimizer}; '
            f'use --optimizer={manifest["optimizer"]} or another checkpoint'
        )


def read_checkpoint(directory: str) -> Checkpoint:
    """Reads the whole network, for an export or an evaluation.

    Raises:
      DamagedCheckpointError: see `validate`.
    """
    manifest = validate(directory)
    layout = Layout(**manifest['layout'])
    everything = slice(0, layout.size)
    counters = manifest['parts'][0]['counters']
    return Checkpoint(
        layout=layout,
        parameters=_gather(directory, manifest, 'parameters', everything),
        target=_gather(directory, manifest, 'target', everything),
        clock={'updates': counters['version'], 'agent_steps': counters['agent_steps']},
    )


def _gather(directory: str, manifest: dict, name: str, wanted: slice) -> np.ndarray:
    """Returns float32 [wanted] of a slot, from all the parts that hold some of it."""
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

    reader = tf.train.load_checkpoint(os.path.join(directory, part['prefix']))
    return np.asarray(reader.get_tensor(f'{name}/.ATTRIBUTES/VARIABLE_VALUE'))


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
        raise DamagedCheckpointError(f'{file} cannot be read ({error}); use another one') from None
    if found != expected:
        raise DamagedCheckpointError(
            f'{file} is damaged: {found["bytes"]} bytes where the manifest says '
            f'{expected["bytes"]}, or another content; use another checkpoint'
        )
