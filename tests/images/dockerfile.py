"""Reads a Dockerfile: a file in, its stages and their instructions out.

Supports what this project's Dockerfiles use: no heredocs, no parser directives, no ONBUILD.
"""

import dataclasses
import json
import re
import shlex
import string
from collections.abc import Mapping
from pathlib import Path


class DockerfileError(ValueError):
    """The file has syntax that this reader does not support; the message quotes it."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, and the rest with lines joined, variables kept."""

    name: str
    rest: str

    def assignments(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Values by name of ENV, LABEL or ARG; omits an ARG without a value."""
        pairs = (word.partition('=') for word in shlex.split(expand(self.rest, variables)))
        return {name: value for name, equals, value in pairs if equals}

    def copy(self) -> tuple[str | None, list[str], str]:
        """Origin of COPY (a stage or image; None: the context), sources, destination.

        Raises:
          DockerfileError: a flag other than --from.
        """
        words = shlex.split(self.rest)
        origin = None
        while words[0].startswith('--'):
            flag, _, value = words.pop(0).partition('=')
            if flag != '--from':
                raise DockerfileError(f'COPY {flag}: only --from is supported')
            origin = value
        return origin, words[:-1], words[-1]

    def arguments(self) -> list[str]:
        """Argument vector of ENTRYPOINT or CMD, which must be in JSON."""
        return json.loads(self.rest)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: after AS; empty without.
      base: the image, or the earlier stage, that it starts from.
      instructions: those behind FROM, in order.
    """

    name: str
    base: str
    instructions: tuple[Instruction, ...]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces $NAME and ${NAME} in `text`, unknown names by nothing."""
    names = re.findall(r'\$\{?(\w+)\}?', text)
    return string.Template(text).safe_substitute({name: variables.get(name, '') for name in names})


def instructions(path: Path) -> list[Instruction]:
    """Every instruction of a file, in order."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith('#')]
    logical = '\n'.join(lines).replace('\\\n', ' ').splitlines()
    found = []
    for line in filter(str.strip, logical):
        name, _, rest = line.strip().partition(' ')
        found.append(Instruction(name.upper(), rest.strip()))
    return found


def stages(path: Path, arguments: Mapping[str, str] | None = None) -> tuple[list[Stage], dict]:
    """The stages of a file, and the values of the ARGs before the first.

    Args:
      path: the Dockerfile.
      arguments: values in place of those in the file (`--build-arg`).
    """
    given = dict(arguments or {})
    known = dict(given)
    found: list[tuple[str, str, list[Instruction]]] = []
    for instruction in instructions(path):
        if instruction.name == 'FROM':
            base, *alias = expand(instruction.rest, known).split()
            found.append((alias[1] if alias else '', base, []))
        elif found:
            found[-1][2].append(instruction)
        else:
            known = {**known, **instruction.assignments(known), **given}
    return [Stage(name, base, tuple(body)) for name, base, body in found], known
