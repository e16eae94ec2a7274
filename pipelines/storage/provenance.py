"""Provenance: what produced a result, as JSON values (command, code, machine, packages).

`launches.jsonl` of a run holds one line for its start and for each resume.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from infra.cores import usable_cores
from infra.disk import read_json_lines, write_atomically

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PACKAGES = (
    'ale-py',
    'apache-beam',
    'dm-reverb',
    'gymnasium',
    'numpy',
    'pyarrow',
    'tensorflow',
    'tf-agents',
)
_GIT_SECONDS = 10.0


def describe(argv: Sequence[str]) -> dict[str, Any]:
    """Describes this process: time (ISO 8601), command, git revision, machine and packages.

    Args:
      argv: the command, program first.
    """
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': shlex.join(argv),
        'git': _revision(),
        'host': socket.gethostname(),
        'processor': _processor(),
        'cores': usable_cores(),
        'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'system': platform.platform(),
        'python': platform.python_version(),
        'packages': {name: _version(name) for name in _PACKAGES},
    }


def add_launch(file: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Appends a line to a run's `launches.jsonl`.

    Args:
      file: that file; it is created if missing.
      row: the values of `describe`, and
        engine: value of --runner;
        resumed: whether an earlier launch is continued;
        changed: [before, after] of each setting that the resume changes, by its name;
        frames, updates, wall_seconds: progress of the run at this moment.

    Raises:
      OSError: the file cannot be written.
    """
    before = file.read_text(errors='replace') if file.exists() else ''
    write_atomically(file, f'{before}{json.dumps(row)}\n')


def launches(file: pathlib.Path) -> list[dict[str, Any]]:
    """The readable lines of a run's `launches.jsonl`, oldest first; empty for a run without."""
    return read_json_lines(file)


def run_id(file: pathlib.Path) -> str:
    """Identifies the run of a `launches.jsonl` among those of equal names; a resume keeps it."""
    first = json.dumps(launches(file)[:1])  # has time, host and command
    return hashlib.sha256(first.encode()).hexdigest()[:8]


def launched_at(row: Mapping[str, Any]) -> float | None:
    """Seconds since 1970 of what `describe` returned; None: its time is not readable."""
    try:
        return datetime.datetime.fromisoformat(str(row.get('time'))).timestamp()
    except (ValueError, OverflowError):
        return None


def _version(package: str) -> str | None:
    """Version of an installed package, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> dict[str, Any] | None:
    """Commit of this checkout and whether it has changes; None outside a git checkout."""
    commit = _git('rev-parse', 'HEAD')
    if not (_ROOT / '.git').exists() or commit is None:
        return None
    changes = _git('status', '--porcelain', '--untracked-files=no')
    return {'commit': commit, 'dirty': changes != ''}


def _git(*arguments: str) -> str | None:
    """Output of a git command in this checkout, None if it fails."""
    try:
        done = subprocess.run(
            ['git', '-C', str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """Name of the processor, by the kernel."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor())
