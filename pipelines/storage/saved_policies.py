"""The directory of a policy's SavedModel: checksums and environment in, a checked directory out.

`policy.json` lies beside TensorFlow's files. SavedModels of earlier versions and of other programs
lack it.
"""

import dataclasses
import pathlib

from agents.config import EnvironmentConfig
from infra.disk import differences, digests, is_remote, write_json
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError, unreadable
from pipelines.experiment import config as config_lib

_POLICY_FILE = 'policy.json'
MODEL = 'saved_model.pb'
_NEEDED = (MODEL, 'policy_specs.pbtxt', 'variables/variables.index')
_VARIABLES = 'variables/variables.data-'


def holds_policy(directory: pathlib.Path) -> bool:
    """Whether the directory holds a SavedModel, damaged or not."""
    return any((directory / name).is_file() for name in (MODEL, _POLICY_FILE))


def describe(directory: pathlib.Path, environment: EnvironmentConfig) -> None:
    """Adds `policy.json` to a complete SavedModel.

    Raises:
      OSError: it is not writable.
    """
    values = {'environment': dataclasses.asdict(environment), 'files': digests(directory)}
    write_json(directory / _POLICY_FILE, seal(values))


def checked(path: str) -> EnvironmentConfig | None:
    """Checks the files of a SavedModel; returns its policy's environment, None if it is unknown.

    Raises:
      UsageError: the directory holds no SavedModel of a policy, or a file is missing or damaged.
    """
    directory = pathlib.Path(path)
    if is_remote(path):
        raise UsageError(
            f'--policy {path}: not on this machine. Fix: copy the SavedModel to a local directory.'
        )
    try:
        found = digests(directory) if holds_policy(directory) else {}
    except OSError as error:
        raise unreadable(error.filename or path, error) from error
    if not found:
        raise UsageError(
            f'--policy {path}: not a SavedModel ({MODEL} is missing). Fix: name the policy/ of a'
            ' run, another SavedModel, or `random`.'
        )
    environment, problem = None, _gap(found)
    if _POLICY_FILE in found:
        environment, problem = _described(directory / _POLICY_FILE, found)
    if problem:
        raise UsageError(
            f'--policy {path}: {problem}. Fix: copy it again, or export it again with'
            ' `pipelines/export.py` of this version.'
        )
    return environment


def _described(
    file: pathlib.Path, found: dict[str, list[int]]
) -> tuple[EnvironmentConfig | None, str]:
    """The environment by `policy.json`; and what makes the SavedModel unusable, if anything."""
    try:
        values = unseal(parse_object(file.read_bytes()))
    except (OSError, ValueError) as error:
        return None, f'damaged ({_POLICY_FILE}: {error})'
    try:
        if change := _change(values['files'], found):
            return None, change
        environment = config_lib.completed('environment', values['environment'])
        config_lib.check_types('environment', EnvironmentConfig, environment)
        return EnvironmentConfig(**environment), ''
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f'{_POLICY_FILE} is of another version ({type(error).__name__}: {error})'


def _gap(found: dict[str, list[int]]) -> str:
    """What a SavedModel with these files lacks, empty if nothing."""
    data = next((name for name in found if name.startswith(_VARIABLES)), f'{_VARIABLES}*')
    for name in (*_NEEDED, data):
        if name not in found:
            return f'damaged ({name}: it is missing)'
        if not found[name][0]:
            return f'damaged ({name}: it is empty)'
    return ''


def _change(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """The first file that is not as it was written, empty if there is none; others may be added."""
    own = {name: found[name] for name in expected.keys() & found.keys()}
    changes = differences(expected, own).items()
    return next((f'damaged ({name}: {how})' for name, how in changes), '')
