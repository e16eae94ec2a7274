"""The CPU that this process may use: its affinity and the quotas of its control groups in."""

import math
import os
import pathlib

from infra.control_groups import Group, groups, lines


def usable_cores(root: pathlib.Path = pathlib.Path('/')) -> float:
    """Cores that this process may keep busy on average; `root` as in `control_groups`."""
    quotas = [_quota(group) for group in groups('cpu', root)]
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def whole_cores() -> int:
    """`usable_cores`, rounded up: the number of busy processes or threads that is of use."""
    return math.ceil(usable_cores())


def _quota(group: Group) -> float:
    """The CPU seconds per second that a group allows."""
    if group.unified:
        fields = ' '.join(lines(group.directory / 'cpu.max')).split()
    else:
        names = ('cpu.cfs_quota_us', 'cpu.cfs_period_us')
        fields = [line for name in names for line in lines(group.directory / name)]
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):
        return math.inf  # `max`, and -1 in version 1
    quota, period = map(int, fields)
    return quota / period if quota and period else math.inf
