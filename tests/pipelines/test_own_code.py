"""Every process of a run imports the same checkout, whatever directory and PYTHONPATH hold."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from infra import named_function
from infra.process import ProcessSpec, SupervisedProcess

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ('agents', 'infra', 'pipelines')
STANDARD = ('queue', 'tempfile')
# What Beam's in-process runner does with every element: in processes that it starts itself.
PIPELINE = """
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

class Where(beam.DoFn):
    def process(self, _):
        import agents, infra, pipelines, queue, tempfile
        modules = (agents, infra, pipelines, queue, tempfile)
        yield ' '.join(['found', *(module.__file__ for module in modules)])

def show(found):  # in one process: the lines of two would run into each other
    print('', *found, sep='\\n', flush=True)

flags = ['--runner=FnApiRunner', '--direct_running_mode=multi_processing', '--direct_num_workers=2']
with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
    found = pipeline | beam.Create([0, 1]) | beam.Reshuffle() | beam.ParDo(Where())
    found | beam.combiners.ToList() | beam.Map(show)
"""


@pytest.fixture(params=[None, '', '{directory}', f'{os.pathsep}nowhere'], ids=repr)
def shadows(request, tmp_path, monkeypatch):
    """The current directory, which has packages and modules of our names; also on PYTHONPATH."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('PYTHONPATH', raising=False)
    if request.param is not None:
        monkeypatch.setenv('PYTHONPATH', request.param.format(directory=tmp_path))
    if not request.param or 'directory' not in request.param:
        for module in STANDARD:  # named by the user, they are Python's own business
            (tmp_path / f'{module}.py').write_text('raise RuntimeError("a stranger")\n')
    return tmp_path


def imported_by(child: SupervisedProcess) -> set[str]:
    child.start()
    code = child.wait(100)
    lines = child.last_log_lines(200)
    assert code == 0, lines
    found = [line.split()[1:] for line in lines if line.startswith('found')]
    return {path for paths in found for path in paths}


OURS = {str(ROOT / package / '__init__.py') for package in PACKAGES}
EXPECTED = OURS | {f'{os.path.dirname(os.__file__)}/{module}.py' for module in STANDARD}


@pytest.mark.end_to_end
def test_workers_that_beam_starts_import_this_checkout(shadows, tmp_path):
    job = SupervisedProcess(
        ProcessSpec('job', [sys.executable, '-c', PIPELINE], tmp_path / 'job.log')
    )
    assert imported_by(job) == EXPECTED


def test_what_a_launcher_starts_imports_this_checkout(shadows, tmp_path):
    code = f'import {", ".join(PACKAGES + STANDARD)}; print("found", *['
    code += ', '.join(f'{module}.__file__' for module in PACKAGES + STANDARD) + '])'
    child = SupervisedProcess(ProcessSpec('child', [sys.executable, '-c', code], tmp_path / 'log'))
    assert imported_by(child) == EXPECTED


def test_a_command_imports_this_checkout(shadows):
    if os.environ.get('PYTHONPATH', '').startswith(os.pathsep):
        # To Python an empty entry is the current directory, which it reads before any line of ours.
        for module in STANDARD:
            (shadows / f'{module}.py').unlink()
    command = [sys.executable, str(ROOT / 'pipelines' / 'stop.py'), '--run_dir=nowhere']
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.count('\n')) == (2, 1), ended.stderr
    assert 'no such run directory' in ended.stderr


def test_a_checkout_run_by_the_environment_of_another_uses_itsown_code(tmp_path):
    for package in PACKAGES:
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    stop = tmp_path / 'pipelines' / 'stop.py'
    found = '    import infra.process\n    print(infra.process.own_code(""))\n'
    main = '    parser = Parser(\n'
    stop.write_text(stop.read_text().replace(main, found + main))
    command = [sys.executable, str(stop), '--run_dir=nowhere']
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"'PYTHONPATH': '{tmp_path}'" in ended.stdout, ended.stderr


def test_every_command_begins_with_its_own_checkout():
    commands = [
        file.read_text()
        for file in (ROOT / 'pipelines').glob('*.py')
        if "__name__ == '__main__'" in file.read_text()
        # The launcher starts these with -m.
        and file.name not in ('evaluator.py', 'finish.py', 'job.py')
    ]
    head = r"\nif __name__ == '__main__':(.*)\n(?:    signal\.signal\(.*\n)?    (sys\.path.*)\n"
    heads = {re.search(head, text) for text in commands}
    assert None not in heads
    assert len({found.groups() for found in heads if found}) == 1
    for text in commands:
        ours = re.search(r'^(from|import) (agents|infra|pipelines)\b', text, re.MULTILINE)
        assert ours is None or ours.start() > text.index('sys.path[')


def test_a_module_of_the_users_is_found_in_the_current_directory_behind_the_libraries(
    tmp_path, monkeypatch
):
    (tmp_path / 'agent_of_a_user.py').write_text('import colorsys\nmake = colorsys.rgb_to_hsv\n')
    (tmp_path / 'colorsys.py').write_text('rgb_to_hsv = print\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, 'colorsys', raising=False)
    factory = named_function.load_function('agent_of_a_user:make')
    assert factory(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)


def test_a_dask_worker_with_other_code_in_its_directory_is_of_another_version(tmp_path):
    shutil.copytree(ROOT / 'agents', tmp_path / 'agents')
    (tmp_path / 'agents' / 'actor.py').write_text('')
    code = 'from pipelines.preflight import dask_cluster; print(dask_cluster._CODE)'
    told = [
        subprocess.run(
            [sys.executable, '-c', code], cwd=directory, capture_output=True, text=True, timeout=60
        ).stdout
        for directory in (ROOT, tmp_path)
    ]
    assert len({*told, ''}) == 3
