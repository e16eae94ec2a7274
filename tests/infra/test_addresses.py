"""Addresses that are reached by no proxy: real servers, and a proxy that would swallow all."""

import contextlib
import os

import pytest
import reverb

from agents.adapters.parameters import ParameterServerOptimizer, ParameterServerVariableContainer
from agents.adapters.replay import ReplayObserver, ShardedReplayBuffer
from infra import probe
from infra.addresses import AddressError, reach_directly
from infra.replay.trajectory import TrajectorySpec
from pipelines.experiment import presets
from pipelines.experiment.launch import Addresses
from pipelines.workers import boxes
from pipelines.workers.spec import WorkerSpec

LOOPBACK = 'localhost,127.0.0.1,::1'
PROXIES = ('http_proxy', 'https_proxy', 'grpc_proxy')
EXCEPTIONS = ('no_proxy', 'NO_PROXY', 'no_grpc_proxy')
NOWHERE = 'http://127.0.0.1:9'  # the port of `discard`, which nothing listens on


@pytest.fixture
def environment(monkeypatch):
    """The environment, without exceptions from proxies."""
    for name in EXCEPTIONS:
        monkeypatch.setenv(name, '')  # so that what is set in its place goes with the test
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def proxied(environment):
    """The same, with a proxy by which nothing is reached."""
    for name in PROXIES:
        environment.setenv(name, NOWHERE)
    return environment


def excepted() -> list[str]:
    return [os.environ.get(name, '') for name in ('no_proxy', 'no_grpc_proxy')]


@pytest.mark.parametrize(
    ('given', 'general', 'grpc'),
    [
        ({}, f'{LOOPBACK},a,::2,b', f'{LOOPBACK},a,::2,b'),
        ({'no_proxy': ' x , b,'}, f'x,b,{LOOPBACK},a,::2', f'x,b,{LOOPBACK},a,::2'),
        ({'NO_PROXY': 'x'}, f'x,{LOOPBACK},a,::2,b', f'x,{LOOPBACK},a,::2,b'),
        (
            {'no_proxy': 'x', 'no_grpc_proxy': 'y'},
            f'x,{LOOPBACK},a,::2,b',
            f'y,{LOOPBACK},a,::2,b',
        ),
        ({'no_proxy': '*'}, '*', f'*,{LOOPBACK},a,::2,b'),
    ],
)
def test_the_users_own_exceptions_stay_and_grow(environment, given, general, grpc):
    for name, value in given.items():
        environment.setenv(name, value)
    for _ in range(2):  # of which the second changes nothing
        reach_directly(['a:1', '[::2]:2', 'a:3'], 'b')
    assert excepted() == [general, grpc]


def test_an_address_that_is_none_is_refused(environment):
    with pytest.raises(AddressError, match='is no address'):
        reach_directly(['host'])


def test_servers_are_reached_past_a_proxy_and_others_are_not(proxied):
    def tables_at(host):
        return reverb.Client(f'{host}:{tables.port}').server_info(timeout=2)

    tables = reverb.Server([reverb.Table.queue('queue', 1)])
    reach_directly([f'127.0.0.1:{tables.port}'])
    assert 'queue' in tables_at('127.0.0.1')
    with pytest.raises(Exception, match='did not complete'):  # the proxy is nowhere
        tables_at('127.0.0.2')
    reach_directly((), '127.0.0.2')
    assert 'queue' in tables_at('127.0.0.2')
    tables.stop()


def open_worker(address):
    with boxes.enlisted(
        presets.experiment('laptop', {}),
        Addresses((address,), (), 'telemetry:1'),
        WorkerSpec(0, 0),
        'actor',
        lambda: pytest.skip('reached'),
    ):
        pass


@pytest.mark.parametrize(
    'connect',
    [
        lambda address: ParameterServerOptimizer([address]),
        lambda address: ParameterServerVariableContainer([address]),
        lambda address: ReplayObserver([address], TrajectorySpec(), 1, timeout_seconds=0.1),
        lambda address: ShardedReplayBuffer([address], TrajectorySpec(), 0.9),
        lambda address: probe.main(['replay', address, '--timeout_seconds=0.1']),
        open_worker,
    ],
    ids=['optimizer', 'container', 'observer', 'buffer', 'probe', 'worker'],
)
def test_whatever_is_given_addresses_reaches_them_past_a_proxy(proxied, connect):
    with contextlib.suppress(Exception, pytest.skip.Exception):  # nobody is there
        connect('127.0.0.3:1')
    assert '127.0.0.3' in excepted()[1]
