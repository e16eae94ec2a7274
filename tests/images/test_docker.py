"""Container images and the Flex Template: their files agree with the project."""

import ast
import fnmatch
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from infra import cluster
from pipelines import flex_template, job
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from tests.images import check, dockerfile

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / 'infra/docker/Dockerfile'
TEMPLATE = ROOT / 'infra/dataflow/flex_template/Dockerfile'
DOCKERFILES = (IMAGES, TEMPLATE)
METADATA = json.loads((TEMPLATE.parent / 'metadata.json').read_text())
PARAMETERS = {parameter['name']: parameter for parameter in METADATA['parameters']}
# What starts in the image `servers`: two servers, and the probe of their pods.
SERVER_PROGRAMS = ('infra.replay.server', 'infra.parameter_server.server', 'infra.probe')


def requirements(name: str) -> dict[str, str]:
    """The packages that a file of the checkout names, each with its one version."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if text := line.partition('#')[0].strip():
            requirement = Requirement(text)
            (version,) = requirement.specifier
            assert version.operator == '=='
            found[requirement.name] = version.version
    return found


def instructions(path: Path, name: str) -> list[dockerfile.Instruction]:
    """The instructions of one name, of every stage."""
    return [each for each in dockerfile.instructions(path) if each.name == name]


def stage(name: str) -> dockerfile.Stage:
    """A stage of the images' Dockerfile."""
    (found,) = (each for each in dockerfile.stages(IMAGES)[0] if each.name == name)
    return found


def copies(path: Path) -> Iterator[tuple[str | None, str]]:
    """(origin, source) of every COPY in a Dockerfile."""
    for instruction in instructions(path, 'COPY'):
        origin, sources, _ = instruction.copy()
        yield from ((origin, source) for source in sources)


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path: the last matching pattern decides."""
    parts = path.split('/')
    ancestors = ['/'.join(parts[: i + 1]) for i in range(len(parts))]
    out = False
    for line in (ROOT / '.dockerignore').read_text().splitlines():
        pattern = line.removeprefix('!').removeprefix('**/')
        candidates = parts if '**/' in line else ancestors
        if (
            line
            and line[0] != '#'
            and any(fnmatch.fnmatchcase(each, pattern) for each in candidates)
        ):
            out = not line.startswith('!')
    return out


class TestDockerfiles:
    """All of them."""

    @pytest.mark.parametrize('path', DOCKERFILES, ids=lambda path: path.parent.name)
    def test_the_linter_finds_nothing(self, path):
        linter = Path(sys.executable).with_name('hadolint')
        done = subprocess.run([linter, '--no-color', path], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, '')

    def test_there_is_no_other(self):
        assert sorted(ROOT.glob('infra/**/*Dockerfile*')) == sorted(DOCKERFILES)

    @pytest.mark.parametrize('path', DOCKERFILES, ids=lambda path: path.parent.name)
    def test_every_foreign_image_has_a_tag_of_one_version(self, path):
        stages, _ = dockerfile.stages(path, {'WORKER_IMAGE': 'registry/gorila:1.0.0'})
        own = {each.name for each in stages}
        used = [each.base for each in stages] + [origin for origin, _ in copies(path) if origin]
        foreign = [image for image in used if image not in own]
        assert foreign
        for image in foreign:
            assert re.search(r':\d+\.\d+\.\d+[\w.-]*$|:\w+_release_\d{8}_RC\d\d$', image), image

    @pytest.mark.parametrize('path', DOCKERFILES, ids=lambda path: path.parent.name)
    def test_everything_copied_is_there_and_let_in(self, path):
        for origin, source in copies(path):
            if origin is None:
                assert (ROOT / source).exists(), source
                assert not ignored(source), source

    @pytest.mark.parametrize(
        'path',
        ['.venv/bin/python', 'runs/pong/config.json', '.git/config', 'tests/images/test_docker.py',
         'README.md', 'agents/__pycache__/actor.cpython-311.pyc', 'infra/replay/__pycache__/x.pyc'],
    )  # fmt: skip
    def test_what_no_image_needs_is_kept_out(self, path):
        assert ignored(path)

    def test_every_target_is_a_stage_with_a_check(self):
        names = [each.name for each in dockerfile.stages(IMAGES)[0]]
        for target in check.TARGETS:
            assert target in names
            assert (check.CHECKS / f'{target.replace("-", "_")}.py').is_file()

    def test_what_an_image_starts_is_in_the_checkout(self):
        (entry,) = (each for each in stage('launcher').instructions if each.name == 'ENTRYPOINT')
        program, script = entry.arguments()
        assert program == 'python'
        (template,) = instructions(TEMPLATE, 'ENV')
        entries = (script, template.assignments({})['FLEX_TEMPLATE_PYTHON_PY_FILE'])
        for file in entries:
            assert (ROOT / Path(file).relative_to('/opt/gorila')).is_file(), file

    def test_a_dask_worker_in_an_image_has_the_configuration_for_long_tasks(self):
        settings: dict[str, str] = {}
        for each in stage('worker').instructions:
            settings |= each.assignments({}) if each.name == 'ENV' else {}
        directory = Path(settings['DASK_CONFIG']).relative_to('/opt/gorila')
        assert (ROOT / directory / 'workers.yaml').is_file()

    @pytest.mark.parametrize('target', ['servers', 'launcher'])
    def test_servers_and_launcher_need_no_root(self, target):
        (user,) = (each.rest for each in stage(target).instructions if each.name == 'USER')
        assert re.fullmatch(r'[1-9]\d*:[1-9]\d*', user)  # Kubernetes' runAsNonRoot requires it

    def test_a_worker_of_any_user_may_write_where_boot_does(self):
        (directory,) = (
            each.rest for each in stage('worker').instructions if each.name == 'WORKDIR'
        )
        assert directory == '/tmp'

    def test_a_server_in_a_pod_has_the_environment_that_a_launcher_gives_it(self):
        found: dict[str, str] = {}
        for name in ('python', 'servers'):
            for each in stage(name).instructions:
                found |= each.assignments({}) if each.name == 'ENV' else {}
        assert cluster.ENVIRONMENT.items() <= found.items()


class TestPins:
    """One version of each package, in every file."""

    def test_beams_harness_is_that_of_the_requirements(self):
        (image,) = (
            origin for origin, _ in copies(IMAGES) if origin and origin.startswith('apache')
        )
        beam = requirements('requirements.txt')['apache-beam']
        assert image == f'apache/beam_python3.11_sdk:{beam}'

    def test_the_servers_run_what_the_constraints_say(self):
        constraints = requirements('constraints.txt')
        for package, version in requirements('infra/docker/requirements-servers.txt').items():
            assert constraints[package.removesuffix('-cpu')] == version, package

    def test_tensorflow_on_an_accelerator_is_the_one_without(self):
        (asked,) = re.findall(r'tensorflow\[and-cuda\]==([\d.]+)', IMAGES.read_text())
        assert asked == requirements('requirements.txt')['tensorflow']

    def test_cudas_packages_are_those_this_tensorflow_asks_for(self):
        asked = [Requirement(text) for text in importlib.metadata.requires('tensorflow') or ()]
        cuda = {
            each.name: str(each.specifier).removeprefix('==')
            for each in asked
            if each.marker
            and each.marker.evaluate({'extra': 'and-cuda'})
            and not each.marker.evaluate({'extra': ''})
        }
        assert cuda
        assert requirements('infra/docker/requirements-gpu.txt') == cuda


def module_file(name: str) -> Path | None:
    """The file of a module of the checkout; None: it does not exist."""
    path = ROOT / name.replace('.', '/')
    files = (path.with_suffix('.py'), path / '__init__.py')
    return next((file for file in files if file.is_file()), None)


def imported(file: Path) -> set[str]:
    """Modules and names that a file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}: a relative import'
            found |= {str(node.module), *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def reachable(programs: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """(modules of infra/, other packages outside the standard library) that programs import."""
    own, others, todo = set(), set(), list(programs)
    while todo:
        name = todo.pop()
        top = name.partition('.')[0]
        if top != 'infra':
            others |= {top} - set(sys.stdlib_module_names)
        elif name not in own and (file := module_file(name)):
            own.add(name)
            todo += imported(file)
            todo.append(name.rpartition('.')[0] or name)  # its package's __init__ runs first
    return own, others


class TestServersRequirements:
    """The image `servers` has only infra/ and requirements-servers.txt."""

    def test_they_hold_everything_that_the_servers_import(self):
        own, packages = reachable(SERVER_PROGRAMS)
        assert {'infra.replay.trajectory', 'infra.parameter_server.shard'} <= own
        assert {'tensorflow', 'reverb', 'ml_dtypes', 'numpy', 'grpc'} <= packages
        held = {
            name.removesuffix('-cpu')
            for name in requirements('infra/docker/requirements-servers.txt')
        }
        distributions = importlib.metadata.packages_distributions()
        for package in packages:
            assert held & set(distributions.get(package, ())), f'{package} is in none of {held}'

    def test_they_hold_nothing_else(self):
        _, packages = reachable(SERVER_PROGRAMS)
        distributions = importlib.metadata.packages_distributions()
        needed = {name for package in packages for name in distributions[package]}
        held = requirements('infra/docker/requirements-servers.txt')
        assert {name.removesuffix('-cpu') for name in held} <= needed


class TestReader:
    """tests/images/dockerfile.py, which images-check builds from."""

    def read(self, directory: Path, text: str) -> tuple[list[dockerfile.Stage], dict]:
        (directory / 'Dockerfile').write_text(text)
        return dockerfile.stages(directory / 'Dockerfile')

    def test_joined_lines_make_one_instruction_and_comments_between_them_none(self, tmp_path):
        text = 'FROM a:1 AS one\nRUN x \\\n# why\n  && y\n'
        (only,) = self.read(tmp_path, text)[0]
        (run,) = only.instructions
        assert (run.name, run.rest.split()) == ('RUN', ['x', '&&', 'y'])

    def test_stages_start_from_arguments_and_from_each_other(self, tmp_path):
        text = 'ARG TAG=1\nFROM a:${TAG} AS one\nFROM one AS two\nFROM two\n'
        stages, arguments = self.read(tmp_path, text)
        named = [(each.name, each.base) for each in stages]
        assert named == [('one', 'a:1'), ('two', 'one'), ('', 'two')]
        assert arguments == {'TAG': '1'}

    def test_environment_keeps_spaces_in_quotes_and_replaces_variables(self):
        env = dockerfile.Instruction('ENV', 'PATH=/opt/bin:$PATH  TITLE="two words"')
        assert env.assignments({'PATH': '/bin'}) == {'PATH': '/opt/bin:/bin', 'TITLE': 'two words'}

    def test_a_flag_of_copy_that_would_be_lost_is_refused(self):
        with pytest.raises(dockerfile.DockerfileError, match='--chown'):
            dockerfile.Instruction('COPY', '--chown=1:1 a b').copy()


def flags_that_a_job_requires(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The required flags, from the error message of pipelines/job.py."""
    with pytest.raises(SystemExit):
        job.main([])
    told = capsys.readouterr().err.partition('arguments are required: ')[2]
    return {flag.strip().removeprefix('--') for flag in told.split(',')}


class TestFlexTemplate:
    """infra/dataflow/flex_template."""

    def test_a_user_must_give_what_the_job_requires_and_the_template_does_not_know(self, capsys):
        known = {flag.partition('=')[0].removeprefix('--') for flag in flex_template.DEFAULTS}
        required = {name for name, each in PARAMETERS.items() if not each.get('isOptional')}
        job_requires = flags_that_a_job_requires(capsys)
        assert required == job_requires - known | {'sdk_container_image'}
        assert job_requires - set(PARAMETERS) == {'runner'}

    def test_the_metadata_are_as_the_service_documents_them(self):
        assert set(METADATA) == {'name', 'description', 'streaming', 'parameters'}
        keys = {'name', 'label', 'helpText', 'isOptional', 'regexes', 'paramType'}
        for parameter in METADATA['parameters']:
            assert {'name', 'label', 'helpText', 'regexes'} <= set(parameter) <= keys
            assert parameter.get('paramType', 'TEXT') in ('TEXT', 'GCS_READ_FILE')

    def test_examples_in_the_help_are_accepted(self):
        examples = 0
        for parameter in METADATA['parameters']:
            for example in re.findall(r'Example: (\S+)$', parameter['helpText']):
                assert all(re.fullmatch(each, example) for each in parameter['regexes']), example
                examples += 1
        assert examples >= 3

    def test_every_parameter_reaches_the_job_that_the_launcher_asks_for(self, tmp_path):
        values = presets.experiment('laptop', {'num_actors': 3})
        (tmp_path / 'config.json').write_text(config_lib.to_json(values))
        given = {
            'actors': '0,1,2',
            'submission': '4',
            'config': str(tmp_path / 'config.json'),
            'parameter_addresses': '10.0.0.1:7101,10.0.0.1:7102',
            'replay_addresses': '10.0.0.2:7001',
            'telemetry_address': '10.0.0.2:7001',
            'sdk_container_image': 'registry/gorila:1',
            'statistics_dir': 'gs://bucket/statistics',
            'worker_machine_type': 'n2-standard-2',
            'dataflow_service_options': 'worker_accelerator=type:nvidia-l4;count:1',
        }
        assert set(given) == set(PARAMETERS) - {'learners', 'bundles'}
        template = tmp_path / 'job_object'
        # Flags of the service's launcher; with an endpoint on localhost Beam needs no bucket.
        launcher = ['--runner=DataflowRunner', '--project=p', '--region=r', '--no_auth']
        launcher += [f'--template_location={template}', f'--temp_location={tmp_path}']
        launcher += ['--dataflow_endpoint=http://localhost:1', '--job_name=gorila']
        command = [sys.executable, str(ROOT / 'pipelines' / 'flex_template.py')]
        command += [f'--{name}={value}' for name, value in given.items()]
        done = subprocess.run(
            [*command, *launcher], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        environment = json.loads(template.read_text())['environment']
        (pool,) = environment['workerPools']
        (image,) = pool['sdkHarnessContainerImages']
        # Three actors on machines of two processors; with an accelerator, one on each.
        assert (pool['machineType'], pool['numWorkers']) == ('n2-standard-2', 3)
        assert image['containerImage'] == 'registry/gorila:1'
        assert environment['serviceOptions'] == [given['dataflow_service_options']]
        pipeline = (tmp_path / 'pipeline.pb').read_bytes()
        assert b'Actor' in pipeline
