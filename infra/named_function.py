"""Functions of a user's: `module:function` in, the function or an error on one line out."""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

_BRIEF_LENGTH = 300


class NoFunctionError(ValueError):
    """There is no such function; the message names it and gives the reason."""


def load_function(name: str) -> Callable[..., Any]:
    """Imports the function named `module:function`.

    Raises:
      NoFunctionError: the import fails, or the module has no such function.
    """
    module_name, _, function = name.partition(':')
    try:
        module = load_module(module_name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name in module_name.split('.')
        remedy = '; put its directory on PYTHONPATH, or change to it' if missing else ''
        reason = f'cannot import {module_name} ({brief(error)})'
        raise NoFunctionError(f'{name}: {reason}{remedy}') from error
    found = getattr(module, function, None)
    if not callable(found):
        raise NoFunctionError(f'{name}: {module_name} has no function {function}')
    return found


def load_module(name: str) -> types.ModuleType:
    """Imports a module, of the current directory too; raises what its code raises."""
    if '' not in sys.path:  # the current directory goes last, so its files shadow no library
        sys.path.append('')
    return importlib.import_module(name)


def brief(error: BaseException) -> str:
    """Formats an error as one line of at most 300 characters after its type."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:_BRIEF_LENGTH]}'
