"""What a run asks of the machine: counted by process, and less when others hold a part."""

import os

import pytest

from pipelines.errors import UsageError
from pipelines.experiment import command_line, presets
from pipelines.preflight import resources
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.space import require_disk

GB = 1_000_000_000
REPLAY_BYTES = 100_000 * resources.BYTES_PER_TRANSITION
ONE_EACH = {'num_replay_shards': 1, 'num_parameter_shards': 1}


def launch(*flags):
    return command_line.parse(flags)[0]


def config(**values):
    values = {
        'screen_size': 84,
        'num_actors': 2,
        'num_learners': 2,
        'replay_capacity': 100_000,
        **ONE_EACH,
        **values,
    }
    return presets.experiment('laptop', values)


@pytest.fixture
def one_core():
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:1])
    yield
    os.sched_setaffinity(0, available)


@pytest.mark.parametrize(
    ('topology', 'flags', 'expected'),
    [
        # Launcher 0.7; evaluator 0.6; jobs 2 x 0.2; servers 2 x 0.55; workers 4 x 0.8;
        # environments 2 x 8 x 0.002; batches 2 x 32 x 0.0004.
        ('separate', (), 6.0576 * GB + REPLAY_BYTES),
        # One job and one worker for each bundle.
        ('bundled', (), 4.2576 * GB + REPLAY_BYTES),
        ('separate', ('--replay_addresses=host:1',), 5.5076 * GB),
        ('separate', ('--parameter_addresses=host:1',), 5.5076 * GB + REPLAY_BYTES),
        ('served', (), 4.2576 * GB + REPLAY_BYTES),
        ('served', ('--replay_addresses=host:1',), 3.7076 * GB),
        # Bundles hold the replay, whoever holds the telemetry.
        ('bundled', ('--replay_addresses=host:1',), 3.7076 * GB + REPLAY_BYTES),
    ],
)
def test_memory_counts_each_process_on_this_machine_once(topology, flags, expected):
    served = {'topology': 'bundled', 'bundle_replay': 'servers'}
    values = served if topology == 'served' else {'topology': topology}
    found = resources.memory_bytes(config(**values), launch(*flags))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ((), 1),
        (('--parameter_ports=1,2,3',), 3),
        (('--parameter_addresses=a:1,b:2,c:3',), 3),
    ],
)
@pytest.mark.usefixtures('one_core')
def test_a_run_starts_no_more_shards_than_cores_unless_each_has_its_place(flags, expected):
    started = launch(*flags).started(config(num_parameter_shards=3))
    assert started.parameter_server.num_parameter_shards == expected
    assert launch(*flags).started(config()) == config()


@pytest.mark.usefixtures('one_core')
def test_memory_counts_the_shards_that_start():
    one = resources.memory_bytes(config(), launch())
    assert resources.memory_bytes(config(num_parameter_shards=31), launch()) == one


@pytest.mark.parametrize(('game', 'expected'), [('pong', 165e6), ('CartPole-v1', 300e6)])
def test_a_transition_of_half_the_size_takes_a_quarter_of_what_its_picture_does(game, expected):
    # 1,200 bytes and a quarter of 1,800, for which a run of Pong took 1,130.
    values = {'game': game, 'replay_capacity': 100_000, 'screen_size': 42}
    assert resources.replay_bytes(presets.experiment('laptop', values)) == expected


def test_disk_counts_the_replay_only_where_it_is_saved():
    with_replay = resources.disk_bytes(config(), launch())
    without = resources.disk_bytes(config(checkpoint_replay=False), launch())
    assert with_replay - without == 3 * REPLAY_BYTES  # two kept, one being written
    assert resources.disk_bytes(config(), launch('--replay_addresses=host:1')) == without
    assert resources.disk_bytes(config(topology='bundled'), launch()) == without
    served = config(topology='bundled', bundle_replay='servers')
    assert resources.disk_bytes(served, launch()) == with_replay


def test_attached_replay_does_not_switch_off_the_check(monkeypatch):
    monkeypatch.setattr('pipelines.storage.space.available_memory', lambda: 1 * GB)
    with pytest.raises(UsageError, match='of memory'):
        resources.require_room(config(), launch('--replay_addresses=host:1'))


def test_checkpoints_of_a_resumed_run_are_not_asked_for_again(tmp_path, monkeypatch):
    run_dir = tmp_path / 'run'
    with RunDirectory.open(run_dir) as directory:
        directory.config_file.write_text('{}')
        with directory.new_checkpoint() as staging:
            (staging / 'run.json').write_bytes(b' ' * 1000)
    asked = []
    monkeypatch.setattr(resources, 'require_memory', lambda needed: None)
    monkeypatch.setattr(
        resources, 'require_disk', lambda path, needed, remedy: asked.append(needed)
    )
    resources.require_room(config(), launch(f'--run_dir={run_dir}'))
    resources.require_room(config(), launch(f'--run_dir={run_dir}', '--resume'))
    assert asked[0] - asked[1] == 1000


def test_a_directory_that_cannot_be_written_is_not_blamed_on_its_space():
    with pytest.raises(UsageError, match='/proc/runs: cannot be written .*choose another dir'):
        require_disk('/proc/runs', 1)
