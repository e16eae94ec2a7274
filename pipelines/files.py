"""Files and directories that readers see whole: the old or the new, never half of one."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces the file `path` by one with this content: readers see the old or the new, whole.

    Raises:
      OSError: the directory cannot be written, or the disk is full; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    temporary = pathlib.Path(name)
    try:
        with os.fdopen(descriptor, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's 0600 would hide results from colleagues
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """`write_atomically` of `value` as JSON, keys in their order.

    Raises:
      ValueError: a number in `value` is not finite (JSON has none such).
      OSError: see `write_atomically`.
    """
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object in the file `path`; None when it is missing, unreadable or another thing."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def replaced_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty directory beside `path` to fill; leaving the block puts it in the place of `path`.

    An exception in the block leaves `path` as it was.

    Raises:
      OSError: the parent directory cannot be written.
    """
    scratch = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.'))
    try:
        filled, before = scratch / 'new', scratch / 'before'
        filled.mkdir()
        yield filled
        if path.exists():
            path.rename(before)
        filled.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
