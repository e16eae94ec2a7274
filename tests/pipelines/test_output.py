"""Output that cannot be written, to real descriptors of each kind."""

import os
import pathlib
import select
import subprocess
import sys
import termios
import time

import pytest

PROGRAM = """
import os, sys
from infra.output import protect_output
from pipelines.monitoring import display
protect_output()
with display.open_display() as shown:
    shown.phase('first')
    sys.stdin.readline()
    for text in 'abc':
        shown.message(text)
    print('unread')
    print('unread', file=sys.stderr, flush=True)
    shown.abandon('unread')
os.write(int(sys.argv[1]), b'end')
sys.exit(7)
"""


def run(output: int, lose=lambda: None) -> None:
    """Runs the program on `output`, which is lost after its first line; it must end well."""
    said, say = os.pipe()
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, str(say)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[say],
        env={**os.environ, 'TERM': 'xterm', 'PYTHONUNBUFFERED': ''},
    )
    os.close(say)
    lose()
    process.communicate(b'\n', timeout=60)
    assert (process.returncode, os.read(said, 10)) == (7, b'end')
    os.close(said)


def test_a_reader_that_goes_away_ends_nothing():
    read, write = os.pipe()

    def lose():
        assert b'first' in os.read(read, 100)
        os.close(write)
        os.close(read)

    run(write, lose)


def test_a_terminal_that_goes_away_ends_nothing():
    master, slave = os.openpty()

    def lose():
        assert os.read(master, 10)
        os.close(slave)
        os.close(master)

    run(slave, lose)


def test_a_full_disk_ends_nothing():
    with open('/dev/full', 'w') as full:
        run(full.fileno())


def test_a_terminal_that_is_stopped_is_not_waited_for():
    master, slave = os.openpty()
    termios.tcflow(slave, termios.TCOOFF)  # what Ctrl-S does
    run(slave)
    os.close(slave)
    os.close(master)


def test_a_reader_that_reads_no_more_is_not_waited_for():
    read, write = os.pipe()
    os.write(write, bytes(select.PIPE_BUF) * 16)  # Linux: a pipe holds 64 KiB
    run(write)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize('unbuffered', [(), ('-u',)])
def test_a_slow_reader_gets_everything(unbuffered):
    text = 'line\n' * 40_000
    program = 'from infra.output import protect_output; protect_output();'
    program += f' print({text[:5]!r} * 40_000, end="")'
    command = [sys.executable, *unbuffered, '-c', program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)  # the pipe is full
        assert process.stdout.read().decode() == text


def test_closed_output_ends_nothing(tmp_path):
    program = f'exec {sys.executable} -c "$0" "$1" >&- 2>&-'
    said, say = os.pipe()
    ended = subprocess.run(
        ['sh', '-c', program, PROGRAM, str(say)], input=b'\n', pass_fds=[say], timeout=60
    )
    assert (ended.returncode, os.read(said, 10)) == (7, b'end')


@pytest.mark.parametrize('unbuffered', [(), ('-u',)])
def test_what_can_be_written_is_written_in_its_order(unbuffered):
    program = (
        'import sys; from infra.output import protect_output; protect_output();'
        'print("one \\udcff"); print("two", file=sys.stderr); print("three", flush=True)'
    )
    command = [sys.executable, *unbuffered, '-c', program]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert ended.stdout == b'one \\udcff\nthree\n'
    assert ended.stderr == b'two\n'


def test_output_reaches_its_file_while_the_descriptor_leads_elsewhere(tmp_path):
    program = (
        'import os, sys; from infra.output import protect_output; protect_output();'
        'os.dup2(os.open(os.devnull, os.O_WRONLY), 2); print("progress", file=sys.stderr)'
    )
    with open(tmp_path / 'stderr', 'w') as stderr:
        subprocess.run([sys.executable, '-c', program], stderr=stderr, timeout=60, check=True)
    assert (tmp_path / 'stderr').read_text() == 'progress\n'


def test_every_command_whose_work_is_more_than_its_output_is_protected():
    root = pathlib.Path(__file__).resolve().parents[2]
    files = [*root.glob('pipelines/*.py'), *root.glob('infra/*/server.py')]
    mains = {
        file: file.read_text().partition("\n\nif __name__ == '__main__':")[2] for file in files
    }
    unprotected = [
        file.name for file, main in mains.items() if main and 'protect_output()' not in main
    ]
    assert unprotected == ['plan.py']


def test_what_the_commands_import_prints_nothing_of_its_own_and_hides_no_warning():
    program = (
        'import sys, warnings; import pipelines.launch.launcher, pipelines.export;'
        'import pipelines.experiment.builders;'
        'import pipelines.job; from tf_agents.policies import policy_saver;'
        'print("gym" in sys.modules); warnings.warn("of another kind")'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'TF_CPP_MIN_LOG_LEVEL'}
    command = [sys.executable, '-c', program]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.stdout == 'True\n'  # Gym, whose notice is silenced, is there
    assert ended.stderr == '<string>:1: UserWarning: of another kind\n'
