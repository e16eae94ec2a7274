"""Settings of the tests and of the processes they start, made before TensorFlow is loaded."""

import os
import pathlib
import signal

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

TESTS = pathlib.Path(__file__).parent

# Byte-code halves the time each server and worker needs to import TensorFlow.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# The suite must pass on two cores, beside the servers it starts; and without an accelerator.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
os.environ.setdefault('TF_NUM_INTEROP_THREADS', '1')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
os.environ.setdefault('MPLBACKEND', 'Agg')
# Under `nohup`, or in a script's background, the processes that the tests start would inherit them.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Each takes more than ten seconds in all on two cores; `make test-fast` leaves them out.
SLOW = frozenset(
    {
        'agents/test_adapters_parameters',
        'agents/test_adapters_replay',
        'agents/test_atari_preprocessing',
        'agents/test_custom_agent',
        'agents/test_games',
        'agents/test_learner',
        'agents/test_priorities',
        'agents/test_py_environment',
        'examples/test_examples',
        'infra/test_array_function',
        'infra/test_cluster',
        'infra/test_parameter_server_process',
        'infra/test_probe',
        'infra/test_process',
        'infra/test_replay_shards',
        'infra/test_state_directory',
        'infra/test_systemd',
        'infra/test_telemetry',
        'pipelines/test_bad_input',
        'pipelines/test_bundle',
        'pipelines/test_dataflow',
        'pipelines/test_device',
        'pipelines/test_engines',
        'pipelines/test_hung_servers',
        'pipelines/test_output',
        'pipelines/test_remote',
        'pipelines/test_report',
        'pipelines/test_report_page',
        'pipelines/test_servers',
        'pipelines/test_signals',
        'pipelines/test_training',
    }
)


_LONGEST_FIRST = (
    'TestOnDask',
    'TestOnAJobServer',
    'test_a_killed_suite',
    'test_an_interrupted_run_at_a_bucket',
    'test_servers_actor_and_learner_on_three_hosts',
    'test_killed_bundle_and_shard',
    'test_all_parts_of_the_family',
    'test_kubernetes.py',
    '/end_to_end/',
)


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.path.relative_to(TESTS).with_suffix('')) in SLOW:
            item.add_marker('slow')

    def place(item):
        begins = (place for place, name in enumerate(_LONGEST_FIRST) if name in item.nodeid)
        return next(begins, len(_LONGEST_FIRST) + ('slow' not in item.keywords))

    items.sort(key=place)


class _Rooms(LoadScopeScheduling):
    """Deals whole runs one by one, all other tests by module or class, which share start-ups."""

    def _split_scope(self, nodeid):
        scope = super()._split_scope(nodeid)
        return nodeid if scope.endswith('.py') and '/end_to_end/' in scope else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue('dist') != 'loadscope':
        return None
    config.option.loadscopereorder = False  # the longest first, not the most tests
    return _Rooms(config, log)


@pytest.fixture
def directory(tmp_path):
    """The open directory of a new run."""
    from pipelines.storage.run_directory import RunDirectory

    with RunDirectory.open(tmp_path / 'run') as opened:
        opened.config_file.write_text('{}')
        yield opened
