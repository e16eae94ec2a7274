"""README and docs name only what exists: links, flags, time-outs; the README fits one sitting."""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

from pipelines.experiment import command_line

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
LINK = re.compile(r'\]\((?!https?://)([^)#]*)(#[^)]+)?\)')
FLAG = re.compile(r'(?<![\w-])--(?:no-)?([a-z][a-z_0-9-]*)')
CODE = re.compile(r'```.*?```|`[^`]+`', re.DOTALL)
COMMAND = re.compile(r'pipelines/(\w+)\.py|-m ((?:infra|pipelines|tests)[\w.]+)|(make run)')
INNER = re.compile(
    r"--\w+_flags='([^']*)'|--flags=?\s?\"([^\"]*)\""
)  # a run's flags, given to others
# Signs of a cluster, a cloud, an engine for images, other hosts, root, or a program of others.
MORE = re.compile(
    r'\b(kubectl|docker|gcloud|sudo|systemctl|images-check|benchmark_hosts|prism)\b|^[a-c]\$', re.M
)
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {'#' + re.sub(r'[^\w -]', '', text.lower()).replace(' ', '-') for text in headings}


@each_page
def test_every_link_leads_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f'{path}{anchor}'


@functools.cache
def flags_of_a_run() -> frozenset[str]:
    """The flags of run.py, those of Beam and of its engines included."""
    for engine in command_line.catalog.ENGINES.values():
        engine.register_flags()
    parser = command_line._parser(own_only=False)
    own = command_line._parser(own_only=True)
    options = {*parser._option_string_actions, *own._option_string_actions}
    return frozenset(option.removeprefix('--') for option in options)


def declared(file: pathlib.Path) -> frozenset[str]:
    """Patterns of the flags that a module gives its parser; not those that its texts name."""
    found = {'help'}
    for node in ast.walk(ast.parse(file.read_text())):
        function = getattr(node, 'func', None)
        name = str(getattr(function, 'attr', getattr(function, 'id', '')))
        if isinstance(node, ast.Call) and name.startswith('add_'):
            parts = [re.sub(r'\{[^}]*\}', r'\\w+', ast.unparse(part)) for part in node.args]
            found |= {part.strip("f'")[2:] for part in parts if part.strip("f'").startswith('--')}
            if name == 'add_shard_flags':
                found |= declared(ROOT / 'infra' / 'flags.py')
    return frozenset(found - {r'\w+'})  # a pattern of any flag would hide a wrong one


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of a command, as patterns."""
    if command in ('make run', 'pipelines.run'):
        return flags_of_a_run()
    named = declared((ROOT / command.replace('.', '/')).with_suffix('.py'))
    takes_beam_flags = command in ('pipelines.servers', 'pipelines.evaluate', 'pipelines.suite')
    return named | flags_of_a_run() if takes_beam_flags else named


def has(flags: frozenset[str], flag: str) -> bool:
    return flag in flags or any(re.fullmatch(known, flag) for known in flags if '\\' in known)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, the rest of its line) of every call of ours in a page's code."""
    for code in CODE.findall(text):
        for line in code.replace('\\\n', ' ').split('\n'):
            for match in COMMAND.finditer(line):
                command = match[2] or match[3] or f'pipelines.{match[1]}'
                following = COMMAND.search(line, match.end())
                yield command, line[match.end() : following.start() if following else None]


@each_page
def test_every_flag_is_one_of_its_command(page):
    for command, arguments in commands(page.read_text()):
        for flag in FLAG.findall(INNER.sub('', arguments)):
            assert has(flags_of(command), flag), f'{command}: --{flag}'


@each_page
def test_every_flag_given_to_a_job_or_a_server_is_one_of_a_run(page):
    for code in CODE.findall(page.read_text()):
        for match in INNER.finditer(code):
            for flag in FLAG.findall(match[1] or match[2]):
                assert has(flags_of_a_run(), flag), f'{match[0]}: --{flag}'


@each_page
def test_every_flag_in_a_sentence_is_one_of_some_command(page):
    for code in re.findall(r'(?<!`)`(--[^`]+)`', page.read_text()):
        for flag in FLAG.findall(code):
            assert has(flags_of_all(), flag), f'--{flag}'


@functools.cache
def flags_of_all() -> frozenset[str]:
    places = ('pipelines', 'infra', 'tests/benchmarks')
    modules = [file for place in places for file in (ROOT / place).rglob('*.py')]
    return flags_of_a_run().union(*map(declared, modules))


@each_page
def test_every_flag_of_the_script_that_installs_units_is_its_own(page):
    script = (ROOT / 'infra' / 'systemd' / 'install.sh').read_text()
    for arguments in re.findall(r'install\.sh ([^`\n]*)', page.read_text()):
        for flag in FLAG.findall(re.sub(r'"[^"]*"', '', arguments)):
            assert re.search(rf'^ *--{flag}\)', script, re.MULTILINE), flag


@each_page
def test_every_target_of_make_exists(page):
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    for code in CODE.findall(page.read_text()):
        assert set(re.findall(r'\bmake ([a-z-]+)', code)) <= {*targets}


@each_page
def test_every_block_that_needs_more_than_this_machine_says_so(page):
    blocks = re.findall(r'([^\n]*)\n\n```\w*\n(.*?)```', page.read_text(), re.DOTALL)
    for before, block in blocks:
        assert not MORE.search(block) or before.startswith('Needs '), block


def time_outs() -> dict[tuple[str, str], float]:
    found = {}
    for package in ('agents', 'infra', 'pipelines'):
        for file in (ROOT / package).rglob('*.py'):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    name = node.targets[0].id
                    if name.endswith('_SECONDS'):
                        value = ast.literal_eval(node.value)
                        found[str(file.relative_to(ROOT)), name] = float(value)
    return found


def test_the_flags_that_a_resume_may_change_are_those_of_the_code():
    text = (ROOT / 'docs' / 'training.md').read_text()
    (paragraph,) = (part for part in text.split('\n\n') if part.startswith('Flags that a resume'))
    assert set(re.findall(r'`--(\w+)`', paragraph)) == command_line.RESUMABLE


def test_the_table_of_time_outs_is_that_of_the_code():
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    rows = re.findall(r'^\| `([\w/.]+)` \| `(\w+_SECONDS)` \| ([\d.]+) \|', text, re.MULTILINE)
    assert {(file, name): float(value) for file, name, value in rows} == time_outs()


def test_the_readme_fits_one_sitting():
    assert len((ROOT / 'README.md').read_bytes()) <= 10_000
