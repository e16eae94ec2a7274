"""Measures available memory and limits this process's own.

A container, a pod, a systemd unit or a batch job is a control group and may be nested in others.
The smallest room of all groups counts. This module reads both versions of the interface, because a
host may use both (https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/).
"""

import dataclasses
import pathlib
import re
import resource
import threading
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class _Interface:
    """File names of one version of the interface.

    Attributes:
      limits: limits of a group in bytes; the smallest counts, and a text such as `max` is no limit.
      used: bytes used by the group and its children.
      cache: entry of memory.stat with the used bytes that the kernel can reclaim.
    """

    limits: tuple[str, ...]
    used: str
    cache: str


_V1 = _Interface(('memory.limit_in_bytes',), 'memory.usage_in_bytes', 'total_inactive_file')
# Above memory.high the kernel throttles processes until they hardly run, instead of failing.
_V2 = _Interface(('memory.max', 'memory.high'), 'memory.current', 'inactive_file')
_V1_ABOVE = 'hierarchical_memory_limit'
"""Entry of memory.stat: smallest limit of the group and its parents, visible here or not."""
_ESCAPED = re.compile(r'\\([0-7]{3})')
_UNLIMITED = 1 << 62


def available_memory(root: pathlib.Path = pathlib.Path('/')) -> int:
    """Bytes available to new processes: the least of the machine's and every group's room.

    `root` is the directory that contains `proc` and the mounts.
    """
    free = _entries(root / 'proc/meminfo').get('MemAvailable:', '').split()
    machine = int(free[0]) * 1024 if free else _UNLIMITED
    return min([machine, *(_room(group, files) for group, files in _groups(root))])


def resident_bytes(pid: int | str = 'self') -> int | None:
    """Memory that a process of this machine holds in RAM; None if there is no such process."""
    try:
        pages = pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()


class OwnBound:
    """Limits what this process allocates; a larger allocation fails. Thread-safe.

    A message that unpacks to gigabytes then fails alone, instead of exhausting the host's memory.
    Files and shared memory that the process maps do not count, thread stacks do.
    """

    def __init__(self, growth_bytes: int) -> None:
        """Allows `growth_bytes` beyond the present use."""
        pages = int(pathlib.Path('/proc/self/statm').read_text().split()[5])  # data and stack
        self._limit = pages * resource.getpagesize() + growth_bytes
        self._lock = threading.Lock()
        self.allow(0)

    def allow(self, size_bytes: int) -> None:
        """Raises the limit, for memory that is not a message's."""
        with self._lock:
            self._limit += size_bytes
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            unlimited = hard == resource.RLIM_INFINITY
            limit = self._limit if unlimited else min(self._limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _groups(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, _Interface]]:
    """Directories of this process's memory groups and of all their parents."""
    own = _own_groups(root)
    for line in _lines(root / 'proc/self/mountinfo'):
        mount, _, system = line.partition(' - ')
        kind, _, options = system.split(' ', 2)
        if kind == 'cgroup2':
            files, path = _V2, own.get('')
        elif kind == 'cgroup' and 'memory' in options.split(','):
            files, path = _V1, own.get('memory')
        else:
            continue
        shown, place = (_unescaped(field) for field in mount.split(' ')[3:5])
        top = root / place.lstrip('/')
        # A container may see only its own group, under a different name than on its host.
        inner = pathlib.PurePosixPath(path or shown)
        group = top / inner.relative_to(shown) if inner.is_relative_to(shown) else top
        yield from ((each, files) for each in (group, *group.parents) if each.is_relative_to(top))


def _own_groups(root: pathlib.Path) -> dict[str, str]:
    """Paths of this process's groups by controller; version 2 has one with an empty name."""
    groups = {}
    for line in _lines(root / 'proc/self/cgroup'):
        _, controllers, path = line.split(':', 2)
        groups.update(dict.fromkeys(controllers.split(','), path))
    return groups


def _room(group: pathlib.Path, files: _Interface) -> int:
    """Bytes that a group's limits leave to new processes."""
    statistics = _entries(group / 'memory.stat')
    texts = [text for name in files.limits for text in _lines(group / name)]
    limits = [int(text) for text in (*texts, statistics.get(_V1_ABOVE, '')) if text.isdecimal()]
    used = _lines(group / files.used)
    if not limits or not used:
        return _UNLIMITED
    return max(0, min(limits) - int(used[0]) + int(statistics.get(files.cache, 0)))


def _entries(path: pathlib.Path) -> dict[str, str]:
    """Parses a file whose lines are a name and a value."""
    pairs = (line.split(None, 1) for line in _lines(path))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _lines(path: pathlib.Path) -> list[str]:
    """The lines of a file, empty if it is unreadable."""
    try:
        return path.read_text(errors='surrogateescape').splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """Decodes a field of mountinfo, where a space is \\040."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1), 8)), field)
