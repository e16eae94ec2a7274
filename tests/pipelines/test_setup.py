"""Set-up by the Makefile, in small copies of the checkout whose requirements are empty."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ('bash', 'make', 'uname', 'awk', 'tee', 'rm', 'touch')
RUN_PY = """
import json, os, sys
import infra
print(json.dumps([sys.argv[1:], os.environ.get('PYTHONDONTWRITEBYTECODE'), infra.__name__]))
"""

# Real pip takes ten seconds to unpack itself into each environment: this one only looks at what it
# is asked to install.
PIP = """
import pathlib, sys
requirements = pathlib.Path(sys.argv[sys.argv.index('-r') + 1])
if 'nonexistent' in requirements.read_text():
    sys.exit(f'ERROR: {requirements}: no such package: nonexistent')
"""

pytestmark = pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the real Makefile, a run.py that tells its arguments, no requirements."""
    root = tmp_path / 'a checkout'
    (root / 'pipelines').mkdir(parents=True)
    (root / 'infra').mkdir()
    (root / 'infra' / '__init__.py').touch()
    (root / 'pipelines' / 'run.py').write_text(RUN_PY)
    shutil.copy(ROOT / 'Makefile', root)
    for name in ('requirements.txt', 'requirements-test.txt', 'constraints.txt'):
        (root / name).write_text('# none\n')
    return root


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python 3.11 whose environments have a stand-in for pip."""
    (tmp_path / 'pip.py').write_text(PIP)
    text = (
        f'[ "$1 $2" = "-m venv" ] || exec {sys.executable} "$@"\n'
        f'{sys.executable} -m venv --without-pip "$3"\n'
        f'cp {tmp_path}/pip.py "$3"/lib/python3.11/site-packages/pip.py'
    )
    return str(script(tmp_path / 'bin' / 'python3.11', text))


def make(
    checkout: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs make as a user would: nothing of the surrounding `make test` is seen."""
    hidden = ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'ARGS', 'PYTHON')
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    named = [f'PYTHON={python}'] if python else []
    return subprocess.run(
        ['make', *arguments, *named],
        cwd=checkout,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def stamp(checkout: Path) -> Path:
    """The file that says that the installation is complete."""
    return checkout / '.venv' / 'installed-for-run'


class TestRefusals:
    """Each: one line with the remedy, exit code 2, nothing installed."""

    def refused(self, checkout: Path, result: subprocess.CompletedProcess[str]) -> str:
        assert result.returncode == 2
        assert result.stdout == ''
        (line,) = result.stderr.splitlines()
        assert not (checkout / '.venv').exists()
        return line

    def test_another_python_version_is_named_with_the_one_needed(self, checkout, tmp_path):
        newer = script(tmp_path / 'python3.13', 'echo 3.13')
        line = self.refused(checkout, make(checkout, 'run', python=str(newer)))
        assert f'PYTHON={newer} is Python 3.13, 3.11 is needed' in line
        assert 'make PYTHON=/path/to/python3.11' in line

    def test_a_python_that_does_not_exist_is_named(self, checkout):
        line = self.refused(checkout, make(checkout, 'test', python='/nonexistent/python'))
        assert 'PYTHON=/nonexistent/python does not run' in line

    def test_no_python_on_the_path_names_the_package_to_install(self, checkout, tmp_path):
        tools = tmp_path / 'tools'
        tools.mkdir()
        for tool in TOOLS:
            (tools / tool).symlink_to(str(shutil.which(tool)))
        line = self.refused(checkout, make(checkout, 'run', python='', PATH=str(tools)))
        assert 'no Python 3.11 on PATH' in line
        assert 'apt-get install python3.11 python3.11-venv' in line

    def test_a_python_without_venv_names_the_package_to_install(self, checkout, tmp_path):
        bare = script(tmp_path / 'python3.11', 'case "$2" in *ensurepip*) exit 1;; esac; echo 3.11')
        line = self.refused(checkout, make(checkout, 'run', python=str(bare)))
        assert f'{bare} has no venv module' in line
        assert 'apt-get install python3.11-venv' in line

    @pytest.mark.parametrize('system', ['Darwin arm64', 'Linux aarch64'])
    def test_another_platform_is_named(self, checkout, tmp_path, system):
        name, machine = system.split()
        uname = script(
            tmp_path / 'bin' / 'uname', f'[ "$1" = -s ] && echo {name} || echo {machine}'
        )
        path = f'{uname.parent}:{os.environ["PATH"]}'
        line = self.refused(checkout, make(checkout, 'run', PATH=path))
        assert f'this machine is {system}' in line
        assert 'Linux x86_64' in line


class TestInstallation:
    def test_run_installs_and_passes_arguments_and_compiles(self, checkout):
        result = make(
            checkout, 'run', 'ARGS=--game breakout', PYTHONDONTWRITEBYTECODE='1', PYTHONPATH='/x'
        )
        assert result.returncode == 0, result.stderr
        last = result.stdout.splitlines()[-1]
        assert last == '[["--runner=DirectRunner", "--game", "breakout"], null, "infra"]'
        assert (checkout / 'infra' / '__pycache__').exists()

    def test_a_second_call_installs_nothing(self, checkout, python):
        make(checkout, 'setup', python=python)
        before = stamp(checkout).stat().st_mtime_ns
        result = make(checkout, 'run', python=python)
        assert 'Installing' not in result.stdout
        assert stamp(checkout).stat().st_mtime_ns == before

    def test_packages_are_importable_from_any_directory(self, checkout, python, tmp_path):
        make(checkout, 'setup', python=python)
        subprocess.run(
            [checkout / '.venv' / 'bin' / 'python', '-c', 'import infra, pipelines'],
            cwd=tmp_path,
            check=True,
            timeout=60,
        )

    def test_a_failed_installation_names_the_log_and_is_done_again(self, checkout, python):
        (checkout / 'requirements.txt').write_text('./nonexistent\n')
        result = make(checkout, 'run', python=python)
        assert result.returncode == 2
        assert 'requirements.txt: pip failed' in result.stderr
        assert f'{checkout}/.venv/pip.log' in result.stderr
        assert 'nonexistent' in result.stdout  # pip's own error
        assert not stamp(checkout).exists()
        (checkout / 'requirements.txt').write_text('# none\n')
        assert make(checkout, 'run', python=python).returncode == 0

    def test_an_interrupted_installation_starts_afresh(self, checkout, python):
        make(checkout, 'setup', python=python)
        stamp(checkout).unlink()  # it is touched last
        half_installed = checkout / '.venv' / 'half_installed'
        half_installed.touch()
        assert make(checkout, 'setup', python=python).returncode == 0
        assert not half_installed.exists()
        assert stamp(checkout).exists()

    def test_changed_requirements_are_installed_into_the_same_environment(self, checkout, python):
        make(checkout, 'setup', python=python)
        kept = checkout / '.venv' / 'kept'
        kept.touch()
        later = time.time() + 5.0
        os.utime(checkout / 'constraints.txt', (later, later))
        assert 'Installing requirements.txt' in make(checkout, 'setup', python=python).stdout
        assert kept.exists()

    def test_a_moved_checkout_is_set_up_anew(self, checkout, python, tmp_path):
        make(checkout, 'setup', python=python)
        moved = checkout.rename(tmp_path / 'moved')
        result = make(moved, 'run', python=python)
        assert 'Installing requirements.txt' in result.stdout
        assert result.returncode == 0, result.stderr

    def test_clean_removes_the_environment_and_keeps_runs(self, checkout, python):
        make(checkout, 'run', python=python)
        (checkout / 'runs').mkdir()
        assert make(checkout, 'clean', python=python).returncode == 0
        assert not (checkout / '.venv').exists()
        assert not list(checkout.rglob('__pycache__'))
        assert (checkout / 'runs').exists()


class TestBrowser:
    """`make browser`, with stand-ins for `id` and `apt-get` and no other program of that name."""

    @pytest.fixture
    def tools(self, tmp_path: Path) -> Path:
        directory = tmp_path / 'tools'
        for tool in TOOLS:
            directory.mkdir(exist_ok=True)
            (directory / tool).symlink_to(str(shutil.which(tool)))
        script(directory / 'id', 'echo 0')
        return directory

    def browser(self, checkout: Path, tools: Path) -> subprocess.CompletedProcess[str]:
        (checkout / '.venv').mkdir(exist_ok=True)
        return make(checkout, 'browser', PATH=str(tools))

    def test_root_installs_chromium_with_fresh_lists(self, checkout, tools):
        script(tools / 'apt-get', f'echo "$@" >> {tools}/calls')
        assert self.browser(checkout, tools).returncode == 0
        update, install = (tools / 'calls').read_text().splitlines()
        assert update == 'update'
        assert install == 'install --yes --no-install-recommends chromium'

    def test_nothing_is_installed_where_chromium_is(self, checkout, tools):
        script(tools / 'apt-get', f'touch {tools}/called')
        script(tools / 'chromium', 'true')
        assert self.browser(checkout, tools).stdout == ''
        assert not (tools / 'called').exists()

    def test_another_user_is_told_the_command(self, checkout, tools):
        script(tools / 'id', 'echo 1000')
        script(tools / 'apt-get', f'touch {tools}/called')
        result = self.browser(checkout, tools)
        assert result.returncode == 0  # the other tests run
        assert 'apt-get install chromium' in result.stderr
        assert not (tools / 'called').exists()

    def test_a_failure_of_apt_get_names_its_log(self, checkout, tools):
        script(tools / 'apt-get', 'echo no network; exit 100')
        result = self.browser(checkout, tools)
        assert result.returncode == 0
        assert '.venv/apt.log' in result.stderr
        assert 'no network' in (checkout / '.venv' / 'apt.log').read_text()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_which_may_end_in_its_own_time(checkout, python, number):
    """Ctrl-C goes to the terminal's group, SIGTERM from a service manager to make alone."""
    (checkout / 'pipelines' / 'run.py').write_text(
        'import pathlib, signal, sys, time\n'
        'def stop(*_):\n'
        '    time.sleep(0.5)\n'
        "    pathlib.Path('stopped').write_text('cleanly')\n"
        '    sys.exit(130)\n'
        'signal.signal(signal.SIGINT, stop)\n'
        'signal.signal(signal.SIGTERM, stop)\n'
        "print('running', flush=True)\n"
        # Not one long sleep: a signal between Python's last look and the system call is seen after.
        'for _ in range(1200):\n'
        '    time.sleep(0.05)\n'
    )
    make(checkout, 'setup', python=python)
    # The suite itself runs under make, whose variables would make this one talkative.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))}
    process = subprocess.Popen(
        ['make', 'run'],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == 'running\n'
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.terminate()
    process.wait(20)
    process.stdout.close()
    assert (checkout / 'stopped').read_text() == 'cleanly'


def test_every_requirement_is_pinned_as_in_the_constraints():
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / name).read_text()
        found = re.findall(r'^([\w.-]+)(?:\[[\w,]+\])?==(\S+)', text, re.MULTILINE)
        lines = [line for line in text.splitlines() if line.strip() and line[0] != '#']
        assert len(found) == len(lines), f'{name}: a line without ==version'
        return dict(found)

    constraints = pins('constraints.txt')
    assert {'tensorflow', 'apache-beam', 'dm-reverb'} <= constraints.keys()
    for name in ('requirements.txt', 'requirements-test.txt'):
        assert pins(name).items() <= constraints.items()


def test_ci_runs_make_test():
    run = ROOT / '.ci' / 'run'
    assert os.access(run, os.X_OK)
    assert 'make test' in run.read_text()
