"""Memory that new processes can have, from the files of machines and containers."""

import pathlib

import pytest

from infra.memory import available_memory

MACHINE = 10_000 * 1024
V2_MOUNT = '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n'
V1_MOUNT = '35 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n'
# What version 1 says of no limit.
NO_LIMIT = 9223372036854771712


@pytest.fixture
def machine(tmp_path):
    """Writes the files of a machine below a directory, and returns what is available there."""

    def available(mounts: str, own: str, **groups: dict[str, object]) -> int:
        write(tmp_path / 'proc/meminfo', 'MemTotal: 20000 kB\nMemAvailable:   10000 kB\n')
        write(tmp_path / 'proc/self/mountinfo', f'23 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}')
        write(tmp_path / 'proc/self/cgroup', own)
        for place, files in groups.items():
            for name, content in files.items():
                write(tmp_path / 'sys/fs/cgroup' / place / f'memory.{name}', f'{content}\n')
        return available_memory(tmp_path)

    return available


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(limit: object, used: int, cache: int = 0, high: object = 'max') -> dict[str, object]:
    stat = f'anon 1\nfile {cache + 9}\ninactive_file {cache}'
    return {'max': limit, 'high': high, 'current': used, 'stat': stat}


def v1(limit: int, used: int, cache: int = 0, above: int = NO_LIMIT) -> dict[str, object]:
    stat = f'inactive_file 9\nhierarchical_memory_limit {above}\ntotal_inactive_file {cache}'
    return {'limit_in_bytes': limit, 'usage_in_bytes': used, 'stat': stat}


class TestWithoutLimit:
    def test_the_machines_own_is_available(self, machine):
        assert machine('', '') == MACHINE

    def test_groups_without_a_limit_change_nothing(self, machine):
        mounts = V1_MOUNT + V2_MOUNT.replace('/sys/fs/cgroup ', '/sys/fs/cgroup/unified ')
        groups = {'memory/job': v1(NO_LIMIT, 500), 'unified/job': v2('max', 500)}
        assert machine(mounts, '4:memory:/job\n0::/job\n', **groups) == MACHINE

    def test_a_limit_above_what_the_machine_has_changes_nothing(self, machine):
        assert machine(V2_MOUNT, '0::/\n', **{'.': v2(2 * MACHINE, 0)}) == MACHINE

    def test_this_machine_has_some(self):
        assert available_memory() > 1_000_000


class TestVersion2:
    def test_a_containers_limit_less_what_it_uses_and_cannot_give_back(self, machine):
        # 5000 - 3000 in use, of which 700 can be taken back.
        assert machine(V2_MOUNT, '0::/\n', **{'.': v2(5000, 3000, cache=700)}) == 2700

    @pytest.mark.parametrize('limited', ['.', 'pods.slice', 'pods.slice/pod', 'pods.slice/pod/own'])
    def test_the_smallest_room_of_the_group_and_of_all_around_it_counts(self, machine, limited):
        groups = {name: v2('max', 300) for name in ('pods.slice', 'pods.slice/pod')}
        groups |= {'pods.slice/pod/own': v2(9000, 300), 'pods.slice/other': v2(350, 300)}
        groups |= {limited: v2(1000, 300)}
        assert machine(V2_MOUNT, '0::/pods.slice/pod/own\n', **groups) == 700

    def test_what_others_use_of_a_group_around_it_is_gone(self, machine):
        groups = {'user': v2(5000, 4600), 'user/job': v2(4000, 100)}
        assert machine(V2_MOUNT, '0::/user/job\n', **groups) == 400

    def test_where_processes_are_slowed_down_counts_as_a_limit(self, machine):
        assert machine(V2_MOUNT, '0::/job\n', job=v2(5000, 1000, high=4000)) == 3000

    def test_a_group_that_is_over_its_limit_leaves_nothing(self, machine):
        assert machine(V2_MOUNT, '0::/job\n', job=v2(5000, 6000)) == 0


class TestVersion1:
    def test_a_group_and_those_around_it_where_the_host_shows_them(self, machine):
        groups = {'memory/slurm': v1(9000, 5000), 'memory/slurm/job': v1(8000, 3000, cache=500)}
        # The job's 8000 - 3000 + 500, the batch system's 9000 - 5000.
        assert machine(V1_MOUNT, '4:cpu,memory:/slurm/job\n', **groups) == 4000

    def test_a_container_sees_its_own_group_at_the_top(self, machine):
        mount = V1_MOUNT.replace('0:32 / ', '0:32 /docker/abc ')
        assert machine(mount, '4:memory:/docker/abc\n', memory=v1(8000, 3000)) == 5000

    def test_a_limit_around_the_container_which_it_does_not_see_counts(self, machine):
        group = v1(NO_LIMIT, 3000, above=7000)
        assert machine(V1_MOUNT, '4:memory:/\n', memory=group) == 4000

    def test_a_mount_together_with_other_controllers_at_a_place_with_a_space(self, machine):
        mount = V1_MOUNT.replace('/cgroup/memory', r'/cgroup/our\040groups')
        mount = mount.replace('rw,memory', 'rw,cpu,memory')
        groups = {'our groups/job': v1(8000, 3000)}
        assert machine(mount, '4:cpu,memory:/job\n', **groups) == 5000
