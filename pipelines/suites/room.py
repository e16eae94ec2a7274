"""How many runs of a suite this machine takes at once: checks of memory, disk and cores."""

import pathlib
from collections.abc import Sequence

from infra.cores import whole_cores
from infra.memory import available_memory
from pipelines.errors import UsageError
from pipelines.preflight.resources import disk_bytes, memory_bytes
from pipelines.storage.space import free_disk
from pipelines.suites.plan import Prepared

_GIB = 2.0**30


def most_at_once(runs: Sequence[Prepared]) -> int:
    """The most runs, at least one, for whose workers and memory this machine has room."""
    cores = whole_cores()
    memory = max(memory_bytes(each.config, each.launch) for each in runs)
    workers = max(map(_workers, runs))
    by_cores = cores // workers if workers else len(runs)
    return max(1, min(by_cores, available_memory() // memory, len(runs)))


def require_room(runs: Sequence[Prepared], at_once: int, path: pathlib.Path) -> list[str]:
    """Checks memory, disk, ports and cores for so many of these runs at once; returns warnings.

    Raises:
      UsageError: memory, disk or cores do not suffice, or runs would share ports.
    """
    memory = _largest([memory_bytes(each.config, each.launch) for each in runs], at_once)
    if (available := available_memory()) < memory:
        raise UsageError(
            f'--parallel: {_need(at_once)} {memory / _GIB:.1f} GiB of memory,'
            f' {available / _GIB:.1f} GiB are available. Fix: choose a smaller'
            f' {"--parallel or " * (at_once > 1)}--replay_capacity, or end other programs.'
        )
    disk = [disk_bytes(each.config, each.launch) for each in runs]
    free = free_disk(path)
    if free < _largest(disk, at_once):
        raise UsageError(
            f'{path}: {free / _GIB:.1f} GiB of disk free, {_need(at_once)}'
            f' {_largest(disk, at_once) / _GIB:.1f} GiB. Fix: free some, choose another'
            ' --suite_dir, or add --no-checkpoint_replay.'
        )
    if at_once > 1 and any(e.launch.parameter_ports or e.launch.replay_ports for e in runs):
        raise UsageError(
            f'--parallel {at_once}: runs cannot share --parameter_ports or --replay_ports. Fix:'
            ' omit them, or choose --parallel 1.'
        )
    return [*_on_disk(path, sum(disk), free), *_on_cores(max(map(_workers, runs)), at_once)]


def _on_disk(path: pathlib.Path, need: int, free: int) -> list[str]:
    if need <= free:
        return []
    return [
        f'{path}: all runs may need {need / _GIB:.0f} GiB of disk, {free / _GIB:.0f} GiB are free.'
        ' Fix: add --no-checkpoint_replay, or free some before it is full.'
    ]


def _on_cores(workers: int, at_once: int) -> list[str]:
    """Raises UsageError if a run has no core of its own; warns if they share some."""
    cores = whole_cores()
    if at_once == 1 or at_once * workers <= cores:
        return []
    if at_once > cores:
        raise UsageError(
            f'--parallel: {at_once} runs at once exceed {cores} core{"s" * (cores != 1)}. Fix:'
            f' choose at most {cores}, or auto.'
        )
    return [
        f'--parallel: {at_once} runs of {workers} workers share {cores} cores, which slows each.'
        ' Fix: choose a smaller --parallel to compare their times.'
    ]


def _need(at_once: int) -> str:
    return '1 run needs' if at_once == 1 else f'{at_once} runs at once need'


def _largest(values: Sequence[int], number: int) -> int:
    return sum(sorted(values, reverse=True)[:number])


def _workers(each: Prepared) -> int:
    """Worker processes of a run on this machine."""
    return sum(each.config.run.workers.values()) if each.launch.engine.runs_locally else 0
