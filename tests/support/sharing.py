"""Files that a group shares: made under umask 002, in a setgid directory."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

SHARED_UMASK = 0o002
_NOBODY = 65534


@contextlib.contextmanager
def shared_umask() -> Iterator[None]:
    """Inside it this process, and those it starts, let their group write what they make."""
    before = os.umask(SHARED_UMASK)
    try:
        yield
    finally:
        os.umask(before)


def unshared(directory: pathlib.Path) -> list[str]:
    """What below `directory` its group may not write, or has another group than it."""
    group = directory.stat().st_gid
    return [
        f'{path.relative_to(directory)} {path.stat().st_mode:o}'
        for path in directory.rglob('*')
        if (path.stat().st_mode & 0o060, path.stat().st_gid) != (0o060, group)
    ]


@contextlib.contextmanager
def as_reader(directory: pathlib.Path) -> Iterator[None]:
    """Inside it this process may read all of `directory` and write nothing there, root or not."""
    for path in (directory, *directory.rglob('*')):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:  # whom no mode keeps out
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (directory, *directory.rglob('*')):
            path.chmod(0o755)


@contextlib.contextmanager
def public_directory() -> Iterator[pathlib.Path]:
    """A directory that every user may enter and write; pytest's own are its user's alone."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        directory.chmod(0o777)
        yield directory
