"""A run over three hosts, with a network between them that delays and loses."""

import pytest

from tests.end_to_end import launching
from tests.support import certificates, hosts

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


def test_servers_actor_and_learner_on_three_hosts_train_over_a_slow_and_lossy_network(tmp_path):
    """Their parameter shards speak TLS."""
    files = certificates.issue(tmp_path, hosts.FIRST)
    tls = [f'--tls_{name}={files[name]}' for name in ('certificate', 'key', 'roots')]
    flags = ('--max_frames=6000', '--num_parameter_shards=2', *tls, *launching.SMALL)
    with hosts.three_host_run(tmp_path, flags, round_trip_ms=10.0, loss=0.001) as process:
        assert launching.finish(process, tmp_path / 'run') == 0, launching.output(tmp_path / 'run')
    summary = launching.check_run_directory(tmp_path / 'run', 6_000)
    # 1,500 agent steps, 400 of them before the first update, 4 an update; the limiter lets sampling
    # lag or lead by 62 updates, and some batches may be under way.
    assert summary['updates'] == pytest.approx(1_100 / 4, abs=62 + 20)
    assert summary['rejected']['stale'] == summary['rejected']['invalid'] == 0
