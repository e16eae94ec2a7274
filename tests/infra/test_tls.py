"""Parameter shards that speak TLS: who is let in, and what is said to those who are not."""

import pathlib
import signal

import numpy as np
import pytest

from infra.parameter_server.protocol import ParameterServerUnavailable
from infra.parameter_server.server import ParameterServer
from infra.tls import TlsError, read_roots, require_accepted, server_context
from pipelines.errors import UsageError
from pipelines.experiment import command_line
from pipelines.preflight import network
from tests.support import certificates
from tests.support.parameter_servers import LAYOUT, ShardProcess, config, connect

ONE = config(num_parameter_shards=1)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return certificates.issue(tmp_path_factory.mktemp('tls'))


@pytest.fixture
def shard(files):
    with ParameterServer(ONE, 0, tls=server_context(files['certificate'], files['key'])) as server:
        yield server


@pytest.mark.parametrize('shared_memory', [True, False])
def test_a_client_that_knows_the_authority_pushes_and_pulls(shard, files, shared_memory):
    roots = read_roots(files['roots'])
    with connect([shard.address], tls_roots=roots, shared_memory=shared_memory) as client:
        client.initialise(np.zeros(LAYOUT.size))
        reply = client.push(np.ones(LAYOUT.size), client.pull().version)
        assert reply.rejected is None
        np.testing.assert_allclose(np.concatenate(reply.snapshot.parts), -1.0, rtol=1e-5)


def test_a_client_without_tls_or_with_another_authority_is_not_let_in(shard, files):
    for roots in (None, read_roots(files['other'])):
        with connect([shard.address], tls_roots=roots, timeout_seconds=2.0) as client:
            with pytest.raises(ParameterServerUnavailable, match=shard.address):
                client.initialise(np.zeros(LAYOUT.size))


def test_a_shard_process_speaks_tls_by_its_flags(files, tmp_path):
    flags = ('--tls_certificate', files['certificate'], '--tls_key', files['key'])
    with ShardProcess(tmp_path, ONE, 0, *flags) as process:
        process.wait_ready()
        roots = read_roots(files['roots'])
        with connect([process.address], tls_roots=roots) as client:
            client.initialise(np.zeros(LAYOUT.size))
            assert client.pull().clock.updates == 0
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(10) == 0


def test_a_key_in_the_file_of_the_roots_stays_there(files, tmp_path):
    both = tmp_path / 'both.pem'
    both.write_bytes(b''.join(pathlib.Path(files[name]).read_bytes() for name in ('key', 'roots')))
    roots = read_roots(str(both))
    assert b'PRIVATE KEY' not in roots
    assert roots.strip() == pathlib.Path(files['roots']).read_bytes().strip()


@pytest.mark.parametrize('given', [('certificate', 'roots'), ('certificate',)])
def test_a_shard_without_the_right_key_does_not_start(files, tmp_path, given):
    flags = [f'--tls_{name}={files[name]}' for name in given[:1]]
    flags += [f'--tls_key={files[name]}' for name in given[1:]]
    with ShardProcess(tmp_path, ONE, 0, *flags) as process:
        code, text = process.wait_failed()
    assert code == 2
    assert '--tls_key' in text


def test_files_that_are_not_what_they_should_be_are_named(files, tmp_path):
    nonsense = tmp_path / 'nonsense.pem'
    nonsense.write_text('nothing')
    with pytest.raises(TlsError, match='--tls_roots .*nonsense'):
        read_roots(str(nonsense))
    with pytest.raises(TlsError, match='--tls_certificate .*roots'):
        server_context(files['roots'], files['key'])


@pytest.mark.parametrize(
    ('roots', 'host', 'reason'),
    [('roots', '10.1.2.3', "not valid for '10.1.2.3'"), ('other', '127.0.0.1', 'unable to get')],
)
def test_a_certificate_that_workers_would_not_accept_is_refused(files, roots, host, reason):
    pair = files['certificate'], files['key']
    require_accepted(pair, files['roots'], '127.0.0.1')
    with pytest.raises(TlsError, match=reason):
        require_accepted(pair, files[roots], host)


def test_roots_without_a_server_that_speaks_tls_are_refused(files):
    launch, _, _ = command_line.parse([f'--tls_roots={files["roots"]}'])
    with pytest.raises(UsageError, match='do not use TLS'):
        network.require_tls(launch)


def test_the_roots_of_a_run_are_its_own_certificate_unless_given(files):
    pair = (f'--tls_certificate={files["certificate"]}', f'--tls_key={files["key"]}')
    launch, _, _ = command_line.parse(pair)
    assert launch.tls == (files['certificate'], files['key'])
    assert launch.tls_roots == files['certificate']
    launch, _, _ = command_line.parse([f'--tls_roots={files["roots"]}'])
    assert (launch.tls, launch.tls_roots) == (None, files['roots'])
    with pytest.raises(UsageError, match='go together'):
        command_line.parse(pair[:1])
    with pytest.raises(UsageError, match='no certificates in PEM'):
        command_line.parse([f'--tls_roots={pathlib.Path(files["key"]).parent / "absent"}'])
