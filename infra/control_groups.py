"""Control groups of this process: a controller's name in, directories with its files out.

A container, a pod, a systemd unit or a batch job is a control group and may be nested in others;
the smallest limit of all groups counts. This module reads both versions of the interface, because a
host may use both (https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/).
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

_ESCAPED = re.compile(r'\\([0-7]{3})')


@dataclasses.dataclass(frozen=True)
class Group:
    """A control group.

    Attributes:
      directory: of its files.
      unified: whether they are those of version 2.
    """

    directory: pathlib.Path
    unified: bool


def groups(controller: str, root: pathlib.Path = pathlib.Path('/')) -> Iterator[Group]:
    """This process's groups with a controller such as `memory`, and all their parents.

    `root` is the directory that contains `proc` and the mounts.
    """
    own = _own_groups(root)
    for line in lines(root / 'proc/self/mountinfo'):
        mount, _, system = line.partition(' - ')
        kind, _, options = system.split(' ', 2)
        if kind == 'cgroup2':
            path = own.get('')
        elif kind == 'cgroup' and controller in options.split(','):
            path = own.get(controller)
        else:
            continue
        shown, place = (_unescaped(field) for field in mount.split(' ')[3:5])
        top = root / place.lstrip('/')
        # A container may see only its own group, under a different name than on its host.
        inner = pathlib.PurePosixPath(path or shown)
        group = top / inner.relative_to(shown) if inner.is_relative_to(shown) else top
        within = (each for each in (group, *group.parents) if each.is_relative_to(top))
        yield from (Group(each, kind == 'cgroup2') for each in within)


def lines(path: pathlib.Path) -> list[str]:
    """The lines of a file, empty if it is unreadable."""
    try:
        return path.read_text(errors='surrogateescape').splitlines()
    except OSError:
        return []


def _own_groups(root: pathlib.Path) -> dict[str, str]:
    """Paths of this process's groups by controller; version 2 has one with an empty name."""
    paths = {}
    for line in lines(root / 'proc/self/cgroup'):
        _, controllers, path = line.split(':', 2)
        paths.update(dict.fromkeys(controllers.split(','), path))
    return paths


def _unescaped(field: str) -> str:
    """Decodes a field of mountinfo, where a space is \\040."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1), 8)), field)
