"""Builds and tries the images without a container engine: `make images-check`.

Reads infra/docker/Dockerfile and builds each stage of a target in a separate directory: debootstrap
provides Debian's Python 3.11 as the base image, RUN runs by chroot in new namespaces, COPY copies.
Then the target's script in tests/images/checks/ runs inside, as the image's user. Needs root and
debootstrap. With a container engine the same scripts try the real images:

  docker run --rm -i --entrypoint python IMAGE - < tests/images/checks/servers.py
"""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from infra.flags import Parser
from tests.images import dockerfile

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / 'infra/docker/Dockerfile'
CHECKS = ROOT / 'tests/images/checks'
TARGETS = ('servers', 'launcher', 'worker', 'learner-gpu')

# python3-distutils and python3-lib2to3: debootstrap does not resolve virtual packages.
_PACKAGES = (
    'python3.11', 'python3.11-venv', 'python3-distutils', 'python3-lib2to3', 'ca-certificates',
    'netbase', 'tzdata',
)  # fmt: skip
# Lets pip reach its index; nothing else of this machine enters an image.
_NETWORK_VARIABLES = (
    'PIP_INDEX_URL', 'PIP_EXTRA_INDEX_URL', 'PIP_TRUSTED_HOST', 'PIP_CERT', 'PIP_PROXY',
    'PIP_DEFAULT_TIMEOUT', 'PIP_RETRIES', 'SSL_CERT_FILE', 'REQUESTS_CA_BUNDLE', 'http_proxy',
    'https_proxy', 'no_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'NO_PROXY',
)  # fmt: skip
_NETWORK_FILES = ('/etc/resolv.conf', '/etc/hosts', '/etc/pip.conf')
_CERTIFICATES = ('PIP_CERT', 'SSL_CERT_FILE', 'REQUESTS_CA_BUNDLE')
_ENTER = (
    'mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc"'
    ' && root="$1" user="$2" && shift 2 && exec chroot --userspec="$user" "$root" "$@"'
)


class CheckError(RuntimeError):
    """An image cannot be built or does not work; the message says where."""


@dataclasses.dataclass
class Image:
    """A stage as built so far.

    Attributes:
      root: directory of its files.
      environment: its ENV, and PATH.
      arguments: its ARG.
      directory: its WORKDIR.
      user: its USER, as user:group.
    """

    root: Path
    environment: dict[str, str]
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    directory: str = '/'
    user: str = '0:0'

    def run(
        self, arguments: Sequence[str], script: Path | None = None, network: bool = False
    ) -> None:
        """Runs a command inside as process 1, as an engine would; `script` is its standard input.

        Raises:
          CheckError: its exit code is not 0.
        """
        lent = {name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ}
        home = '/root' if self.user == '0:0' else '/home/gorila'
        variables = {'HOME': home, **(lent if network else {}), **self.environment}
        command = ['unshare', '--mount', '--pid', '--fork', '--kill-child', 'sh', '-c', _ENTER]
        command += ['enter', str(self.root), self.user, 'env', '-i']
        command += [f'{name}={value}' for name, value in variables.items()]
        command += ['sh', '-c', 'cd "$1" && shift && exec "$@"', 'in', self.directory, *arguments]
        with open(script or os.devnull) as stdin:
            code = subprocess.run(command, stdin=stdin).returncode
        if code:
            raise CheckError(f'{self.root.name}: {" ".join(arguments)}: exit code {code}')


class Builder:
    """Builds stages of a Dockerfile, each once, in a directory below `directory`."""

    def __init__(self, path: Path, directory: Path) -> None:
        found, self._arguments = dockerfile.stages(path)
        self._stages = {stage.name: stage for stage in found}
        self._directory = directory
        self._images: dict[str, Image] = {}

    def image(self, name: str) -> Image:
        """The finished stage `name`.

        Raises:
          CheckError: one of its instructions fails.
        """
        if name not in self._images:
            self._images[name] = self._build(self._stages[name])
        return self._images[name]

    def _build(self, stage: dockerfile.Stage) -> Image:
        root = self._directory / stage.name
        base = self.image(stage.base) if stage.base in self._stages else self._base(stage.base)
        started = time.monotonic()
        subprocess.run(['cp', '-a', '--reflink=auto', base.root, root], check=True)
        image = dataclasses.replace(
            base, root=root, environment=dict(base.environment), arguments={}
        )
        for instruction in stage.instructions:
            self._obey(image, instruction)
        print(f'-- stage {stage.name}: {time.monotonic() - started:.0f} s', flush=True)
        return image

    def _base(self, name: str) -> Image:
        """Debian's Python 3.11, also named `python`, instead of python:3.11-slim.

        Raises:
          CheckError: the base image is another.
        """
        if not name.startswith('python:3.11.'):
            raise CheckError(f'FROM {name}: no replacement for this base image')
        root = self._directory / 'debian'
        print(f'-- {name}: replaced by Debian bookworm', flush=True)
        packages = f'--include={",".join(_PACKAGES)}'
        _call(['debootstrap', '--variant=minbase', packages, 'bookworm', str(root)])
        (root / 'usr/local/bin/python').symlink_to('/usr/bin/python3.11')
        certificates = (os.environ.get(name, '') for name in _CERTIFICATES)
        for file in filter(os.path.isfile, (*_NETWORK_FILES, *certificates)):
            target = root / file.lstrip('/')
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        path = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        return Image(root, {'PATH': path})

    def _obey(self, image: Image, instruction: dockerfile.Instruction) -> None:
        variables = {**image.arguments, **image.environment}
        match instruction.name:
            case 'ARG':
                given = instruction.assignments(variables)
                known = {name: self._arguments.get(name, '') for name in instruction.rest.split()}
                image.arguments.update(given or known)
            case 'ENV':
                image.environment.update(instruction.assignments(variables))
            case 'WORKDIR':
                image.directory = os.path.join(image.directory, instruction.rest)
                (image.root / image.directory.lstrip('/')).mkdir(parents=True, exist_ok=True)
            case 'USER':
                image.user = instruction.rest
            case 'COPY':
                self._copy(image, instruction)
            case 'RUN':
                print(f'-- {instruction.rest}', flush=True)
                assigned = [f'{name}={value}' for name, value in image.arguments.items()]
                image.run(['env', *assigned, 'sh', '-ec', instruction.rest], network=True)
            case 'LABEL' | 'CMD' | 'ENTRYPOINT':
                pass
            case other:
                raise CheckError(f'{other}: unknown instruction')

    def _copy(self, image: Image, instruction: dockerfile.Instruction) -> None:
        origin, sources, destination = instruction.copy()
        if origin is not None and origin not in self._stages:
            print(f'-- skipped, needs a container engine: COPY {instruction.rest}', flush=True)
            return
        context = ROOT if origin is None else self.image(origin).root
        inside = os.path.join(image.directory, destination)
        target = image.root / inside.lstrip('/')
        for source in sources:
            file = context / source.lstrip('/')
            if file.is_file():
                into = target / file.name if destination.endswith('/') else target
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, into)
            elif origin is None:
                ignored = shutil.ignore_patterns('__pycache__')  # as in .dockerignore
                shutil.copytree(file, target, ignore=ignored, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(['cp', '-a', '--reflink=auto', f'{file}/.', target], check=True)


def _call(command: Sequence[str]) -> None:
    """Runs a command silently.

    Raises:
      CheckError: it fails; the message holds its output.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckError(f'{" ".join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}')


def _megabytes(root: Path) -> int:
    return int(subprocess.check_output(['du', '-sxm', str(root)]).split()[0])


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise CheckError('only root can build the images. Fix: sudo make images-check')
    if shutil.which('debootstrap') is None:
        raise CheckError(
            'debootstrap: not installed. Fix: apt-get install debootstrap (Debian, Ubuntu)'
        )


def main(argv: Sequence[str]) -> int:
    """Builds and tries the targets; returns 1 if one does not work, else 0."""
    parser = Parser(prog='python -m tests.images.check', description=__doc__)
    parser.add_argument('targets', nargs='*', metavar='TARGET', help=f'of {", ".join(TARGETS)}')
    parser.add_argument('--keep', type=Path, help='new directory in which to keep the roots')
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f'unknown target: {", ".join(sorted(unknown))}')
    with contextlib.ExitStack() as stack:
        try:
            _require_tools()
            if options.keep is None:
                temporary = tempfile.TemporaryDirectory(prefix='images-')
                directory = Path(stack.enter_context(temporary))
            else:
                directory = options.keep.absolute()
                directory.mkdir(parents=True)
            builder = Builder(DOCKERFILE, directory)
            for target in options.targets or TARGETS:
                image = builder.image(target)
                image.run(['python', '-'], CHECKS / f'{target.replace("-", "_")}.py')
                print(f'== {target}: works, {_megabytes(image.root)} MB', flush=True)
        except CheckError as error:
            print(f'images-check: {error}', file=sys.stderr)
            return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
