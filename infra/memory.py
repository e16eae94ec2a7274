"""Measures memory: what is available, and what a process holds."""

import dataclasses
import pathlib
import resource

from infra.control_groups import Group, groups, lines


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
_UNLIMITED = 1 << 62


def available_memory(root: pathlib.Path = pathlib.Path('/')) -> int:
    """Bytes available to new processes: the least of the machine's and every group's room.

    `root` is the directory that contains `proc` and the mounts.
    """
    free = _entries(root / 'proc/meminfo').get('MemAvailable:', '').split()
    machine = int(free[0]) * 1024 if free else _UNLIMITED
    return min([machine, *map(_room, groups('memory', root))])


def resident_bytes(pid: int | str = 'self') -> int | None:
    """Memory that a process of this machine holds in RAM; None if there is no such process."""
    try:
        pages = pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()


def _room(group: Group) -> int:
    """Bytes that a group's limits leave to new processes."""
    files = _V2 if group.unified else _V1
    statistics = _entries(group.directory / 'memory.stat')
    texts = [text for name in files.limits for text in lines(group.directory / name)]
    limits = [int(text) for text in (*texts, statistics.get(_V1_ABOVE, '')) if text.isdecimal()]
    used = lines(group.directory / files.used)
    if not limits or not used:
        return _UNLIMITED
    return max(0, min(limits) - int(used[0]) + int(statistics.get(files.cache, 0)))


def _entries(path: pathlib.Path) -> dict[str, str]:
    """Parses a file whose lines are a name and a value."""
    pairs = (line.split(None, 1) for line in lines(path))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
