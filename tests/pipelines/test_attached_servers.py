"""Attaching to servers: real ones in this process, that fit the run or do not."""

import contextlib

import numpy as np
import pytest

from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import PROTOCOL_VERSION, RequestRefusedError
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from pipelines.errors import UsageError
from pipelines.experiment import command_line
from pipelines.experiment.frames import trajectory_spec
from pipelines.preflight import attached_servers
from tests.support import parameter_servers

SHARDS = ('--num_parameter_shards=2', '--replay_capacity=1000', '--min_replay_size=100')


@pytest.fixture
def servers():
    """Starts the servers of an experiment; gives the parameter shards and the flags to attach."""
    with contextlib.ExitStack() as stack:

        def start(*flags, telemetry=True, experience=True):
            _, preset, values = command_line.parse([*SHARDS, *flags])
            config = command_line.experiment(preset, values)
            shards = stack.enter_context(parameter_servers.serve(config.parameter_server))
            settings = ShardConfig(
                config.served_replay,
                trajectory_spec(config),
                config.learner.batch_size,
                telemetry,
                experience,
            )
            replay = start_server(build_tables(settings, 0))
            stack.callback(stop_server, replay)
            return shards, (
                f'--parameter_addresses={",".join(shard.address for shard in shards)}',
                f'--replay_addresses=127.0.0.1:{replay.port}',
            )

        yield start


def check(*flags):
    launch, preset, values = command_line.parse([*SHARDS[1:], *flags])
    attached_servers.require_servers(command_line.experiment(preset, values), launch)


def test_new_servers_of_the_same_experiment_pass(servers):
    check(*servers()[1])
    check('--n_step=5', *servers('--n_step=5')[1])
    check('--priority_exponent=0.6', *servers('--priority_exponent=0.6')[1])
    check('--agent_steps_per_update=0', *servers('--agent_steps_per_update=0')[1])


@pytest.mark.parametrize(
    ('flag', 'named'),
    [
        ('--optimizer=rmsprop', '--optimizer adam'),
        ('--target_update_period=7', '--target_update_period 500'),
        ('--learning_rate_updates=7', '--learning_rate_updates 187500'),
        ('--average_updates=700', '--average_updates 3000'),
        ('--n_step=3', 'rows and bytes of an item'),
        ('--replay_capacity=2000', 'capacity 1000'),
        ('--min_replay_size=200', 'minimum size 100'),
        ('--batch_size=16', 'samples per insert'),
        ('--priority_exponent=0.7', 'priority exponent'),
    ],
)
def test_a_server_started_with_another_value_is_refused(servers, flag, named):
    _, addresses = servers()
    with pytest.raises(UsageError, match=named):
        check(*addresses, flag)


@pytest.mark.parametrize(
    ('theirs', 'ours', 'named'),
    [
        ('CartPole-v1', 'pong', 'rows and bytes of an item'),
        # One-hot fields, 16 bytes, are as long as CartPole's four numbers.
        ('FrozenLake-v1', 'CartPole-v1', 'frames rows_uint8_16_stack_1, but this run uses rows_fl'),
    ],
)
def test_a_server_of_other_frames_is_refused(servers, theirs, ours, named):
    _, addresses = servers(f'--environment={theirs}', '--preset=laptop')
    with pytest.raises(UsageError, match=named):
        check(*addresses, f'--environment={ours}', '--preset=laptop')


def test_a_server_of_the_same_structure_passes(servers):
    flags = ('--environment=tests.support.environments:structured', '--preset=laptop')
    check(*flags, *servers(*flags)[1])


def test_a_client_may_choose_its_own_wire(servers):
    check('--wire=bfloat16', '--no-shared_memory', *servers()[1])


def test_a_shard_of_another_version_is_refused(servers, monkeypatch):
    monkeypatch.setattr(attached_servers, 'PROTOCOL_VERSION', PROTOCOL_VERSION + 1)
    with pytest.raises(UsageError, match=f'another version .protocol {PROTOCOL_VERSION}, here'):
        check(*servers()[1])


def test_a_shard_of_before_the_falling_step_size_serves_only_runs_without_it(servers):
    shards, _ = servers('--learning_rate_updates=0')
    report = shards[0].shard.report()
    for added in ('learning_rate_end', 'learning_rate_updates'):
        del report['config'][added]

    def check_shard(*flags):
        _, preset, values = command_line.parse([*SHARDS, *flags])
        config = command_line.experiment(preset, values)
        attached_servers._check_parameter_shard(report, config, 0, 'host:1')

    check_shard('--learning_rate_updates=0')
    with pytest.raises(UsageError, match='started with --learning_rate_updates 0, but this run'):
        check_shard()


def test_shards_in_another_order_are_refused(servers):
    shards, (_, replay) = servers()
    swapped = f'--parameter_addresses={shards[1].address},{shards[0].address}'
    with pytest.raises(UsageError, match='is parameter shard 1, but .* lists it as shard 0'):
        check(swapped, replay)


def test_parameters_of_another_run_are_refused(servers):
    shards, addresses = servers()
    layout = Layout(('kernel',), ((4,),))
    shards[0].shard.initialise(layout, np.zeros(2, np.float32))
    with pytest.raises(UsageError, match='belongs to another run'):
        check(*addresses)


def test_a_shard_that_was_told_to_stop_is_refused(servers):
    shards, addresses = servers()
    shards[1].shard.control.request_stop()
    with pytest.raises(UsageError, match='belongs to another run'):
        check(*addresses)


def test_shards_that_a_run_has_just_taken_are_refused(servers):
    shards, addresses = servers()
    with parameter_servers.connect([shard.address for shard in shards]) as client:
        client.claim('runs/first')
        client.claim('runs/first')  # again, as after a broken stream
        with pytest.raises(UsageError, match='belongs to another run, runs/first'):
            check(*addresses)
        with pytest.raises(RequestRefusedError, match='belongs to the run runs/first'):
            client.claim('runs/second')


def resume(run_dir, *addresses):
    launch, preset, values = command_line.parse(
        [*SHARDS[1:], '--resume', f'--run_dir={run_dir}', *addresses]
    )
    attached_servers.require_servers(command_line.experiment(preset, values), launch)


def test_a_run_that_goes_on_finds_the_servers_that_have_its_state(servers, tmp_path):
    shards, addresses = servers()
    layout = Layout(('kernel',), ((4,),))
    with pytest.raises(UsageError, match='belongs to no run, not to'):
        resume(tmp_path, *addresses)
    with parameter_servers.connect([shard.address for shard in shards], layout=layout) as client:
        client.claim(str(tmp_path))
        with pytest.raises(UsageError, match='holds no state'):
            resume(tmp_path, *addresses)
        client.initialise(np.zeros(4, np.float32))
        client.request_stop()
        resume(tmp_path, *addresses)
        with pytest.raises(
            UsageError, match='to resume from the checkpoint with new servers, omit'
        ):
            resume(tmp_path / 'other', *addresses)
        assert client.pull().clock.stopping
        client.claim(str(tmp_path))  # the run begins again
        assert not client.pull().clock.stopping


def test_a_run_told_to_go_before_it_learned_may_begin_again_with_its_servers(servers, tmp_path):
    shards, addresses = servers()
    layout = Layout(('kernel',), ((4,),))
    with parameter_servers.connect([shard.address for shard in shards], layout=layout) as client:
        client.claim(str(tmp_path))
        client.initialise(np.zeros(4, np.float32))
        client.report(owner=str(tmp_path))
        check(*addresses, f'--run_dir={tmp_path}')
        client.push(np.zeros(4, np.float32), 0)
        with pytest.raises(UsageError, match=r'update 1\)\. Fix: add --resume'):
            check(*addresses, f'--run_dir={tmp_path}')
        with pytest.raises(UsageError, match='belongs to another run'):
            check(*addresses, f'--run_dir={tmp_path / "other"}')


def test_all_shards_must_be_named(servers):
    shards, (_, replay) = servers()
    with pytest.raises(UsageError, match=r'one of 2 parameter shards\. Fix: list all'):
        check(f'--parameter_addresses={shards[0].address}', replay)


def test_a_replay_without_the_telemetry_queue_is_refused_in_the_first_place(servers):
    with pytest.raises(UsageError, match='no telemetry queue'):
        check(*servers(telemetry=False)[1])


def test_a_bundled_runs_server_fits_a_bundled_run_only(servers):
    _, addresses = servers(experience=False)
    check('--topology=bundled', '--num_actors=2', '--num_learners=2', *addresses)
    with pytest.raises(UsageError, match="no table 'experience'"):
        check(*addresses)


def test_bundles_at_servers_fit_a_replay_that_waits_for_nothing(servers):
    bundles = ('--topology=bundled', '--num_actors=2', '--num_learners=2')
    at_servers = (*bundles, '--bundle_replay=servers')
    _, addresses = servers(*at_servers)
    check(*at_servers, *addresses)
    with pytest.raises(UsageError, match='started with minimum size 1, but this run uses 100'):
        check(*addresses)


def test_the_number_of_shards_is_that_of_the_addresses():
    _, _, values = command_line.parse(['--parameter_addresses=a:1,b:2,c:3'])
    assert values == {'num_parameter_shards': 3}
    with pytest.raises(UsageError, match='contradicts --parameter_addresses, which names 3'):
        command_line.parse(['--parameter_addresses=a:1,b:2,c:3', '--num_parameter_shards=2'])
