"""The cluster: with stand-ins for its rules, with the real servers for what it is there for."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infra import cluster as cluster_lib
from infra.cluster import Cluster, ClusterConfig, ClusterError
from infra.parameter_server.config import ParameterServerConfig
from infra.replay.config import ReplayConfig
from infra.replay.trajectory import TrajectorySpec
from tests.support.waiting import eventually, has_ended, pause

ROOT = Path(__file__).resolve().parents[2]


def answers(address: str) -> bool:
    """Whether somebody takes connections at `host:port`."""
    host, port = address.split(':')
    try:
        socket.create_connection((host, int(port)), 2.0).close()
    except OSError:
        return False
    return True


def failure_of(cluster: Cluster) -> str:
    """What the cluster's check says; empty: nothing."""
    try:
        cluster.check()
    except ClusterError as error:
        return str(error)
    return ''


def free_ports(count: int) -> tuple[int, ...]:
    """Ports nobody listens on at the moment."""
    listeners = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = tuple(listener.getsockname()[1] for listener in listeners)
    for listener in listeners:
        listener.close()
    return ports


def cluster_config(run_directory: Path, **changes) -> ClusterConfig:
    """Two parameter shards, one replay shard."""
    config = ClusterConfig(
        run_directory=run_directory,
        parameter_server=ParameterServerConfig(num_parameter_shards=2),
        replay=ReplayConfig(num_replay_shards=1),
        trajectory=TrajectorySpec(),
        startup_timeout_seconds=20.0,
    )
    return dataclasses.replace(config, **changes)


def arguments(run_directory: Path, server: str) -> list[dict]:
    """What a stand-in was started with, one entry a start."""
    log = (run_directory / 'logs' / f'{server}.log').read_text()
    return [json.loads(text) for text in re.findall(r'^arguments (.*)$', log, re.MULTILINE)]


@pytest.fixture
def stand_ins(monkeypatch):
    """Servers that start in a tenth of a second, and restart without waiting long."""
    command = (sys.executable, '-m', 'tests.support.fake_server')
    commands = {cluster_lib.PARAMETER_SERVER: command, cluster_lib.REPLAY: command}
    monkeypatch.setattr(cluster_lib, '_COMMANDS', commands)
    monkeypatch.setattr(cluster_lib, '_FIRST_BACK_OFF_SECONDS', 0.1)
    monkeypatch.setattr(cluster_lib, '_LONGEST_BACK_OFF_SECONDS', 0.2)


@pytest.mark.usefixtures('stand_ins')
class TestRules:
    def test_every_server_serves_inside_and_none_outside(self, tmp_path):
        with Cluster(cluster_config(tmp_path)) as cluster:
            assert len(cluster.parameter_addresses) == 2
            assert len(cluster.replay_addresses) == 1
            assert cluster.telemetry_address == cluster.replay_addresses[0]
            addresses = cluster.parameter_addresses + cluster.replay_addresses
            assert all(map(answers, addresses))
            assert list(cluster.pids) == ['replay_0', 'parameter_server_0', 'parameter_server_1']
            assert cluster.restarts == {'parameter_server': 0, 'replay': 0}
            cluster.check()
        assert all(has_ended(pid) for pid in cluster.pids.values())
        assert not any(map(answers, addresses))
        cluster.close()  # a second time: nothing happens

    def test_servers_that_were_started_before_are_the_ones_that_serve_inside(self, tmp_path):
        cluster = Cluster(cluster_config(tmp_path))
        cluster.start()
        started = cluster.pids
        assert len(started) == 3
        with cluster:
            assert cluster.pids == started
            assert all(map(answers, cluster.parameter_addresses))
        assert all(has_ended(pid) for pid in started.values())

    def test_servers_that_were_started_end_though_nobody_waited_for_them(self, tmp_path):
        cluster = Cluster(cluster_config(tmp_path))
        cluster.start()
        cluster.close()
        assert all(has_ended(pid) for pid in cluster.pids.values())

    def test_servers_get_their_configuration_shard_and_checkpoint_directory(self, tmp_path):
        config = cluster_config(
            tmp_path,
            replay=ReplayConfig(num_replay_shards=2),
            replay_checkpoint_directory=tmp_path / 'checkpoints',
        )
        with Cluster(config):
            pass
        (first,) = arguments(tmp_path, 'replay_0')
        (second,) = arguments(tmp_path, 'replay_1')
        (shard,) = arguments(tmp_path, 'parameter_server_1')
        assert (first['shard'], second['shard'], shard['shard']) == (0, 1, 1)
        assert second['checkpoint_dir'] == str(tmp_path / 'checkpoints' / 'shard-1')
        assert first['restore'] is shard['restore'] is None
        settings = json.loads(Path(shard['config']).read_text())
        assert ParameterServerConfig(**settings) == config.parameter_server
        settings = json.loads(Path(first['config']).read_text())
        assert ReplayConfig(**settings['replay']) == config.replay
        assert settings['batch_size'] == 32
        assert settings['telemetry']
        assert settings['experience']

    def test_a_watch_that_fails_as_nobody_foresaw_is_told_and_not_for_ever_tried(
        self, tmp_path, monkeypatch
    ):
        def fail():
            raise KeyError('server')

        with Cluster(cluster_config(tmp_path)) as cluster:
            monkeypatch.setattr(cluster_lib, '_POLL_SECONDS', 0.0)
            cluster.poll = fail  # type: ignore[method-assign]
            assert eventually(lambda: '20 times in a row' in failure_of(cluster))
            (line,) = cluster.news()
            assert line.startswith("launcher: KeyError: 'server'")

    def test_without_experience_one_replay_server_holds_telemetry(self, tmp_path):
        config = cluster_config(
            tmp_path, experience=False, replay=ReplayConfig(num_replay_shards=3)
        )
        with Cluster(config) as cluster:
            assert cluster.replay_addresses == ()
            assert answers(cluster.telemetry_address)
            assert len(cluster.pids) == 1 + 2

    def test_given_ports_are_used(self, tmp_path):
        ports = free_ports(3)
        config = cluster_config(tmp_path, parameter_ports=ports[:2], replay_ports=ports[2:])
        with Cluster(config) as cluster:
            addresses = cluster.parameter_addresses + cluster.replay_addresses
            assert addresses == tuple(f'127.0.0.1:{port}' for port in ports)

    def test_given_addresses_are_attached_to_and_outlive_the_cluster(self, tmp_path):
        with Cluster(cluster_config(tmp_path / 'other')) as other:
            config = cluster_config(
                tmp_path / 'own',
                parameter_addresses=other.parameter_addresses,
                replay_addresses=other.replay_addresses,
            )
            with Cluster(config) as cluster:
                assert cluster.parameter_addresses == other.parameter_addresses
                assert cluster.telemetry_address == other.telemetry_address
                assert cluster.pids == {}
            assert answers(other.telemetry_address)

    def test_an_address_where_nobody_answers_is_named(self, tmp_path):
        (port,) = free_ports(1)
        config = cluster_config(
            tmp_path, replay_addresses=(f'127.0.0.1:{port}',), startup_timeout_seconds=0.5
        )
        with (
            pytest.raises(ClusterError, match=f'127.0.0.1:{port}: no server accepts connections'),
            Cluster(config),
        ):
            pass

    def test_an_address_without_port_is_named(self, tmp_path):
        config = cluster_config(tmp_path, replay_addresses=('somewhere',))
        with pytest.raises(ClusterError, match="'somewhere' .*host:port"), Cluster(config):
            pass

    def test_a_server_that_fails_to_start_is_named_with_its_code_and_words(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv('GORILA_FAKE_FAILS', 'parameter_server_1')
        cluster = Cluster(cluster_config(tmp_path))
        with pytest.raises(ClusterError) as caught, cluster:
            pass
        assert 'parameter_server_1 ended with exit code 1' in str(caught.value)
        assert 'parameter_server_1: told to fail' in str(caught.value)
        assert all(has_ended(pid) for pid in cluster.pids.values())

    def test_a_server_that_never_serves_is_named_after_the_time_out(self, tmp_path, monkeypatch):
        monkeypatch.setenv('GORILA_FAKE_HANGS', 'replay_0')
        cluster = Cluster(cluster_config(tmp_path, startup_timeout_seconds=0.5))
        with pytest.raises(ClusterError, match='not serving after .*replay_0 still runs'), cluster:
            pass
        assert all(has_ended(pid) for pid in cluster.pids.values())

    def test_a_killed_server_returns_on_its_port_from_the_latest_checkpoint(self, tmp_path):
        latest: dict[tuple[str, int], str] = {}
        config = cluster_config(tmp_path)
        with Cluster(config, lambda component, shard: latest.get((component, shard))) as cluster:
            addresses, pid = cluster.parameter_addresses, cluster.pids['parameter_server_1']
            latest['parameter_server', 1] = str(tmp_path / 'checkpoint-7')
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: cluster.restarts['parameter_server'] == 1)
            assert eventually(lambda: answers(addresses[1]))
            assert cluster.parameter_addresses == addresses
            assert cluster.restarts == {'parameter_server': 1, 'replay': 0}
        first, second = arguments(tmp_path, 'parameter_server_1')
        assert first['restore'] is None
        assert second['restore'] == str(tmp_path / 'checkpoint-7')
        assert f':{second["port"]}' in addresses[1]
        assert len(arguments(tmp_path, 'parameter_server_0')) == 1

    def test_a_server_that_keeps_failing_is_given_up_with_a_reason(self, tmp_path, monkeypatch):
        with Cluster(cluster_config(tmp_path)) as cluster:
            monkeypatch.setenv('GORILA_FAKE_FAILS', 'replay_0')
            os.kill(cluster.pids['replay_0'], signal.SIGKILL)
            assert eventually(lambda: 'replay_0: told to fail' in failure_of(cluster))
            assert cluster.restarts['replay'] == cluster_lib.FAILED_STARTS_TO_GIVE_UP
            assert all(map(answers, cluster.parameter_addresses))

    def test_a_server_that_ends_soon_after_each_start_is_given_up_with_a_reason(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(cluster_lib, '_LONGEST_BACK_OFF_SECONDS', 0.1)
        with Cluster(cluster_config(tmp_path)) as cluster:
            monkeypatch.setenv('GORILA_FAKE_ENDS', 'replay_0')
            os.kill(cluster.pids['replay_0'], signal.SIGKILL)
            assert eventually(lambda: bool(cluster.abandoned))
            with pytest.raises(ClusterError, match='(?s)8 times, each soon.*replay_0.log ends'):
                cluster.check()
            assert cluster.restarts['replay'] == cluster_lib.ENDS_TO_GIVE_UP - 1
            first, *_, last = cluster.news()
        assert 'replay_0 was ended by SIGKILL; it starts again in 0.1 s; log: ' in first
        assert 'ended with exit code 1 (RuntimeError: told to end)' in last

    def test_a_restarted_server_that_hangs_is_killed_and_started_again(self, tmp_path, monkeypatch):
        with Cluster(cluster_config(tmp_path, startup_timeout_seconds=1.0)) as cluster:
            monkeypatch.setenv('GORILA_FAKE_HANGS', 'replay_0')
            os.kill(cluster.pids['replay_0'], signal.SIGKILL)
            assert eventually(lambda: cluster.restarts['replay'] == 1)
            monkeypatch.setenv('GORILA_FAKE_HANGS', '')
            assert eventually(lambda: cluster.restarts['replay'] == 2)
            assert eventually(lambda: answers(cluster.telemetry_address))

    def test_an_error_while_restarting_is_not_the_end(self, tmp_path):
        calls: list[int] = []

        def restore(component: str, shard: int) -> None:
            calls.append(shard)
            if len(calls) == 4:  # three servers started before
                raise OSError('the checkpoint directory cannot be read')

        with Cluster(cluster_config(tmp_path), restore) as cluster:
            os.kill(cluster.pids['replay_0'], signal.SIGKILL)
            assert eventually(lambda: cluster.restarts['replay'] == 1)
            assert eventually(lambda: answers(cluster.telemetry_address))
            assert len(calls) == 5

    def test_a_signal_to_the_terminals_group_does_not_reach_the_servers(self, tmp_path):
        with Cluster(cluster_config(tmp_path)) as cluster:
            groups = {os.getpgid(pid) for pid in cluster.pids.values()}
            assert os.getpgid(0) not in groups

    @pytest.mark.parametrize(
        ('changes', 'message'),
        [
            ({'parameter_ports': (1,)}, r'\(1,\) do not fit 2 parameter'),
            ({'replay_ports': (1, 2)}, r'\(1, 2\) do not fit 1 replay'),
            (
                {'replay_ports': (1,), 'replay_addresses': ('a:1',)},
                r'\(1,\) and replay_addresses .* contradict',
            ),
        ],
    )
    def test_contradictory_ports_are_refused(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            cluster_config(tmp_path, **changes)

    def test_no_server_outlives_a_killed_parent(self, tmp_path):
        code = (
            'import sys, time; from pathlib import Path; from infra import cluster as c;'
            ' from tests.infra.test_cluster import cluster_config;'
            ' command = (sys.executable, "-m", "tests.support.fake_server");'
            ' c._COMMANDS = {c.PARAMETER_SERVER: command, c.REPLAY: command};'
            f' cluster = c.Cluster(cluster_config(Path({str(tmp_path)!r}))).__enter__();'
            ' print(*cluster.pids.values(), flush=True); time.sleep(60)'
        )
        parent = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE)
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert eventually(lambda: all(map(has_ended, pids)))


@pytest.mark.slow
class TestRealServers:
    @pytest.fixture(scope='class')
    def layout(self):
        from infra.parameter_server.layout import Layout

        return Layout(('weights',), ((10,),))

    def test_killed_servers_return_and_clients_go_on(self, tmp_path, layout):
        """One start of the real servers for all of this: each start costs TensorFlow's import."""
        import reverb

        from infra.parameter_server.client import ParameterClient

        latest: dict[str, str] = {}
        config = cluster_config(tmp_path, startup_timeout_seconds=100.0)
        values = np.arange(10, dtype=np.float32)
        with Cluster(config, lambda component, _: latest.get(component)) as cluster:
            tables = reverb.Client(cluster.telemetry_address).server_info(timeout=10)
            assert set(tables) == {'experience', 'telemetry'}
            with ParameterClient(
                cluster.parameter_addresses, layout, timeout_seconds=100.0
            ) as client:
                client.initialise(values)
                client.save(tmp_path / 'checkpoint')
                latest['parameter_server'] = str(tmp_path / 'checkpoint')
                for name in ('parameter_server_1', 'replay_0'):
                    os.kill(cluster.pids[name], signal.SIGKILL)
                assert eventually(lambda: cluster.restarts == {'parameter_server': 1, 'replay': 1})
                with ParameterClient(
                    cluster.parameter_addresses, layout, timeout_seconds=100.0
                ) as second:
                    restored = second.pull().values
                    assert restored is not None
                    np.testing.assert_array_equal(restored, values)
                pause(cluster.pids['parameter_server_0'])
                assert not cluster.kill_hung('127.0.0.1:1', 0.0)
                address = cluster.parameter_addresses[0]
                assert not cluster.kill_hung(address, 600.0)  # it does not serve for so long yet
                assert cluster.kill_hung(address, 0.0)
                assert eventually(lambda: cluster.restarts['parameter_server'] == 2)
            assert eventually(lambda: answers(cluster.telemetry_address), 100.0)
            pids = list(cluster.pids.values())
        assert all(map(has_ended, pids))

    def test_a_busy_port_is_named(self, tmp_path):
        with socket.create_server(('127.0.0.1', 0)) as busy:
            port = busy.getsockname()[1]
            config = cluster_config(
                tmp_path, parameter_ports=(port, free_ports(1)[0]), startup_timeout_seconds=100.0
            )
            expected = rf'parameter_server_0 ended with exit code 2(.|\n)*{port}'
            with pytest.raises(ClusterError, match=expected), Cluster(config):
                pass
