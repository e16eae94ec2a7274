"""Cores that a process may use, from its affinity and the files of control groups."""

import os
import pathlib

import pytest

from infra.cores import usable_cores, whole_cores

OWN = len(os.sched_getaffinity(0))
V2 = '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n'
V1 = '35 31 0:32 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n'
JOB = {'cpu/job/cpu.cfs_quota_us': '25000', 'cpu/job/cpu.cfs_period_us': '100000'}


@pytest.mark.parametrize(
    ('mount', 'own', 'files', 'cores'),
    [
        ('', '', {}, OWN),
        (V2, '0::/\n', {'cpu.max': 'max 100000'}, OWN),
        (V2, '0::/\n', {'cpu.max': '10000000 100000'}, OWN),  # 100 cores, fewer are here
        (V2, '0::/\n', {'cpu.max': '50000 100000'}, 0.5),
        (V2, '0::/pod/own\n', {'pod/cpu.max': '30000 100000', 'pod/own/cpu.max': 'max 1000'}, 0.3),
        (V1, '4:cpu,cpuacct:/job\n', JOB, 0.25),
        (V1, '4:cpu,cpuacct:/job\n', JOB | {'cpu/job/cpu.cfs_quota_us': '-1'}, OWN),
    ],
)
def test_a_quota_of_a_control_group_bounds_the_cores(tmp_path, mount, own, files, cores):
    written = {'proc/self/mountinfo': mount, 'proc/self/cgroup': own}
    written |= {f'sys/fs/cgroup/{name}': content for name, content in files.items()}
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(tmp_path / name).write_text(content)
    assert usable_cores(tmp_path) == cores


def test_a_part_of_a_core_is_one_to_work_on(monkeypatch):
    monkeypatch.setattr('infra.cores.usable_cores', lambda: 0.5)
    assert whole_cores() == 1
