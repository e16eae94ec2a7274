"""Imports point down, from commands to servers: no room knows one above it, no module a circle.

Imports inside functions and for type checkers count as others do. Functions are short.
"""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipelines.engines.catalog import ENGINES

ROOT = pathlib.Path(__file__).resolve().parents[1]
# From the top; rooms on one line know nothing of each other.
ORDER = (
    ('pipelines',),  # the commands
    ('pipelines.launch', 'pipelines.suites'),
    ('pipelines.reporting',),
    ('pipelines.transforms',),
    ('pipelines.preflight', 'pipelines.monitoring', 'pipelines.workers'),
    ('pipelines.evaluation',),
    ('pipelines.storage',),
    ('pipelines.experiment',),
    ('pipelines.engines',),
    ('pipelines.events', 'pipelines.errors'),
    ('agents',),
    ('infra',),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ('agents', 'infra', 'pipelines'):
        for file in sorted((ROOT / package).rglob('*.py')):
            name = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
            yield name.removesuffix('.__init__'), ast.parse(file.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


TREES = dict(modules())
ARROWS = sorted(
    (name, target)
    for name, tree in TREES.items()
    for imported in set(imports(tree))
    for target in (imported, imported.rpartition('.')[0])
    if target in TREES and target not in ('pipelines', name)
)


def box(module: str) -> str:
    """The room of a module; a command is one of its own."""
    return '.'.join(module.split('.')[:2])


def room(module: str) -> str:
    parts = module.split('.')
    return next(r for n in (2, 1) if (r := '.'.join(parts[:n])) in LEVELS)


def test_an_import_points_down():
    between = [(a, b) for a, b in ARROWS if room(a) != room(b)]
    assert between
    assert not [(a, b) for a, b in between if LEVELS[room(a)] >= LEVELS[room(b)]]


def test_what_an_engine_imports_by_name_is_of_its_room():
    names = [engine.options_module for engine in ENGINES.values() if engine.options_module]
    assert names
    assert all(name.startswith('pipelines.engines.') for name in names)


def test_no_two_modules_import_each_other():
    left = dict.fromkeys(TREES, None)
    while leaves := [m for m in left if not any(a == m and b in left for a, b in ARROWS)]:
        for leaf in leaves:
            del left[leaf]
    assert not left


def test_few_arrows_lead_from_room_to_room():
    inside = [(box(a), box(b)) for a, b in ARROWS if a.startswith('pipelines.') and b in TREES]
    arrows = {(a, b) for a, b in inside if a != b and b.startswith('pipelines.')}
    assert len(arrows) <= 105, sorted(arrows)


def test_no_function_is_longer_than_40_lines():
    functions = [
        (f'{module}: {node.name}', node.end_lineno - node.lineno + 1)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    assert functions
    assert not [(name, lines) for name, lines in functions if lines > 40]


IMPORTS = (ast.Import, ast.ImportFrom)
HEAVY = ('apache_beam', 'matplotlib', 'reverb', 'tensorflow', 'tf_agents')


def loaded_by(command: str) -> set[str]:
    """All that the import of a command imports, functions and type checking aside."""
    found: set[str] = set()
    waiting = [command]
    while waiting:
        body = TREES[waiting.pop()].body
        new = set(imports(ast.Module([node for node in body if type(node) in IMPORTS], [])))
        new |= {name.rpartition('.')[0] for name in new}
        waiting += [name for name in new - found if name in TREES]
        found |= new
    return found


@pytest.mark.parametrize(
    'command',
    [
        *('evaluate', 'evaluator', 'export', 'finish', 'record_starts', 'report', 'run'),
        *('servers', 'stop', 'suite'),
        'experiment.command_line',
        'launch.launcher',  # it starts the servers first
    ],
)
def test_commands_import_heavy_libraries_only_where_they_need_them(command):
    loaded = loaded_by(f'pipelines.{command}')
    assert 'pipelines.errors' in loaded
    assert not [name for name in loaded if name.split('.')[0] in HEAVY]


def test_the_rooms_themselves_import_nothing():
    # So that a command imports TensorFlow and Beam only where it needs them.
    assert not [f for f in (ROOT / 'pipelines').glob('*/__init__.py') if f.read_text()]


def test_a_run_on_this_machine_is_checked_without_beam_and_tensorflow():
    # Each check may import them where it needs them; a local run without flags of Beam needs none.
    program = """
import sys
from pipelines import run
from pipelines.launch.interrupts import StartUp

with StartUp() as start_up:
    run.prepare(['--environment=CartPole-v1'], start_up)
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""
    argv = [sys.executable, '-c', program, *HEAVY]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, ''), ended
