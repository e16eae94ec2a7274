"""A real TensorBoard server lists scalars, hyperparameters and texts, also after a resume."""

import json
import sys
import urllib.parse
import urllib.request

import portpicker
import pytest

from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.storage.run_directory import RunDirectory
from tests.support import engines
from tests.support.waiting import eventually

EVALUATION = {'protocol': 'no-op starts', 'episodes': 30, 'epsilon': 0.05, 'mean': 15.0, 'std': 2.0}
CHECKPOINT = {'agent_steps': 100, 'updates': 10}
"""At 400 frames, before the last of 800."""


def config(learning_rate, command):
    settings = {'preset': 'laptop', 'learning_rate': learning_rate, 'double_dqn': True}
    launch = {'command': command, 'engine': 'DirectRunner', 'packages': {'numpy': '1.26.4'}}
    return MonitorConfig('pong', 'laptop', 7, 4000, settings=settings, launch=launch)


def train(directory, config_, resumed_from=None, agent_steps=200):
    with Monitor(directory, config_, resumed_from) as monitor:
        monitor.clock(updates=agent_steps // 10, agent_steps=agent_steps)
        episode = {'kind': 'episode', 'component': 'actor', 'worker': 0, 'session': 's'}
        monitor.fold(
            [{**episode, 'time': float(agent_steps), 'raw_return': -20.0, 'agent_steps': 90}]
        )
        monitor.write_summary('max_frames', EVALUATION)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """The URL of a server for two runs: `new`, and `resumed` from before its end."""
    root = tmp_path_factory.mktemp('tensorboard')
    with RunDirectory.open(root / 'new') as directory:
        train(directory, config(1e-4, 'run.py --game pong'))
    with RunDirectory.open(root / 'resumed') as directory:
        train(directory, config(1e-4, 'run.py --game pong'))
        train(directory, config(2e-4, 'run.py --resume'), CHECKPOINT, agent_steps=300)
    port = portpicker.pick_unused_port()
    flags = (f'--logdir={root}', f'--port={port}', '--host=127.0.0.1', '--reload_interval=1')
    argv = (sys.executable, '-m', 'tensorboard.main', *flags)
    with engines.running(argv, root / 'log', port):
        url = f'http://127.0.0.1:{port}/data/'
        assert eventually(lambda: len(ask(url + 'runs')) == 2, 60.0)
        yield url


def ask(url, body=None):
    """The JSON answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def texts(server, run, tag):
    """(step, HTML) of each text of a run."""
    query = urllib.parse.urlencode({'run': run, 'tag': tag})
    return [(row['step'], row['text']) for row in ask(f'{server}plugin/text/text?{query}')]


@pytest.mark.parametrize('run', ['new/events', 'resumed/events'])
def test_scalars_and_texts_are_listed(server, run):
    scalars = ask(server + 'plugin/scalars/tags')[run]
    assert {'return/evaluation', 'return/episode', 'return/mean_100'} < scalars.keys()
    assert {'configuration', 'provenance'} <= set(ask(server + 'plugin/text/tags')[run])


def test_the_texts_of_the_start_stay_beside_those_of_a_resume(server):
    for tag, before, after in [
        ('configuration', '0.0001', '0.0002'),
        ('provenance', 'run.py --game pong', 'run.py --resume'),
    ]:
        (first, old), (second, new) = texts(server, 'resumed/events', tag)
        assert (first, second) == (0, 400)
        assert f'<code>{before}</code>' in old
        assert f'<code>{after}</code>' in new
        assert '<h2>resumed</h2>' in old  # the run's name


def test_runs_are_compared_by_their_first_hyperparameters_and_last_returns(server):
    experiment = ask(server + 'plugin/hparams/experiment', {})
    types = {info['name']: info['type'] for info in experiment['hparamInfos']}
    assert types == {
        'preset': 'DATA_TYPE_STRING',
        'learning_rate': 'DATA_TYPE_FLOAT64',
        'double_dqn': 'DATA_TYPE_BOOL',
    }
    metrics = [info['name']['tag'] for info in experiment['metricInfos']]
    assert metrics == ['return/evaluation', 'return/episode']
    wanted = {'startIndex': 0, 'sliceSize': 10, 'allowedStatuses': ['STATUS_UNKNOWN']}
    groups = ask(server + 'plugin/hparams/session_groups', wanted)['sessionGroups']
    found = {group['name']: group for group in groups}
    assert found.keys() == {'new', 'resumed'}
    for group in groups:
        settings = {'preset': 'laptop', 'learning_rate': 1e-4, 'double_dqn': True}
        assert group['hparams'] == settings
        returns = {row['name']['tag']: row['value'] for row in group['metricValues']}
        assert returns == {'return/evaluation': 15.0, 'return/episode': -20.0}
