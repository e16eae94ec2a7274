"""Shared memory between a client and a shard on one host: gradient in, parameters and target out.

The client creates a file in /dev/shm, the shard maps it, and the client unlinks it at once. The
memory lives as long as the two mappings, so a killed process leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import uuid

import numpy as np

_DIRECTORY = '/dev/shm'
_NAME = re.compile(r'gorila-[0-9a-f]{32}')
_LOOPBACK = re.compile(r'(localhost|127(\.\d+){3}|\[?::1\]?)')
GRADIENT, PARAMETERS, TARGET = _TENSORS = ('gradient', 'parameters', 'target')
_ELEMENT_BYTES = np.dtype(np.float32).itemsize


def host_identity() -> str | None:
    """Returns the boot ID of this machine, or None if the kernel provides none."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return file.read().strip()
    except OSError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name always denotes this machine."""
    return _LOOPBACK.fullmatch(host) is not None


class Segment:
    """Three float32 vectors in memory that two processes share, or that one keeps private.

    Attributes:
      name: of the file; None for private memory.
      tensors: float32 [size] by name: `GRADIENT`, written by the client, `PARAMETERS` and `TARGET`,
        written by the shard.
    """

    def __init__(self, memory: mmap.mmap, size: int, name: str | None = None) -> None:
        self.name = name
        # Each vector starts on a page boundary, because TensorFlow needs aligned memory.
        self.tensors = {
            tensor: np.frombuffer(memory, np.float32, size, region * _region_bytes(size))
            for region, tensor in enumerate(_TENSORS)
        }

    @classmethod
    def private(cls, size: int) -> Segment:
        """Allocates memory private to this process, for a client on another host."""
        return cls(mmap.mmap(-1, _segment_bytes(size)), size)

    @classmethod
    def create(cls, size: int) -> Segment:
        """Creates the file; the caller must `unlink` it.

        Raises:
          OSError: /dev/shm does not exist or is full.
        """
        name = f'gorila-{uuid.uuid4().hex}'
        path = os.path.join(_DIRECTORY, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserves the blocks, because writing to a full /dev/shm raises SIGBUS.
            os.posix_fallocate(descriptor, 0, _segment_bytes(size))
            return cls(mmap.mmap(descriptor, _segment_bytes(size)), size, name)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, name: str, size: int) -> Segment:
        """Maps a file that another process created.

        Raises:
          ValueError: the name, owner or length of the file is wrong.
          OSError: the file does not exist here.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f'{name!r} is not the name of a shared segment')
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(os.path.join(_DIRECTORY, name), flags)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_size != _segment_bytes(size):
                raise ValueError(f'{name} belongs to another user or has another size')
            return cls(mmap.mmap(descriptor, _segment_bytes(size)), size, name)
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        """Removes the file's name; the memory lives while it is mapped."""
        if self.name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(_DIRECTORY, self.name))


def _segment_bytes(size: int) -> int:
    return len(_TENSORS) * _region_bytes(size)


def _region_bytes(size: int) -> int:
    pages = -(-size * _ELEMENT_BYTES // mmap.PAGESIZE)
    return pages * mmap.PAGESIZE
