"""An error of the user's, or of the work, and how every command reports it: one line."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

Main = Callable[[Sequence[str]], int]
"""Runs a command: arguments in, exit code out."""


class UsageError(Exception):
    """A mistake the user can fix, or a subclass's; one line that names value and remedy.

    Attributes:
      exit_code: of a command that it ends.
    """

    exit_code: ClassVar[int] = 2


class FailedError(UsageError):
    """Work failed that was requested correctly; commands report it like a `UsageError`."""

    exit_code = 1


_REMEDIES = {
    errno.ENOSPC: 'free some disk space',
    errno.EDQUOT: 'free some of your disk quota',
    errno.EACCES: 'ask its owner for access',
    errno.EPERM: 'ask its owner for access',
    errno.EROFS: 'mount the file system writable',
    errno.ENOTDIR: 'put the directory back, or remove the file',
    errno.EISDIR: 'put the file back, or remove the directory',
}
_CHECK = 'check the disk'
_WRONG_KIND = {errno.ENOTDIR: 'not a directory', errno.EISDIR: 'not a file'}


def reason_of(error: Exception) -> str:
    """Why a file cannot be read or written, without its path; the text of another error."""
    number = error.errno if isinstance(error, OSError) else None
    return str(error) if number is None else os.strerror(number)


def remedy_of(error: Exception) -> str:
    """What the user can do about a file that cannot be read or written; empty if unknown.

    Also finds the system's reason in the text of an error that comes from another process.
    """
    text = system_reason(error)
    return next((fix for number, fix in _REMEDIES.items() if os.strerror(number) == text), '')


def system_reason(error: Exception) -> str:
    """The system's reason in the text of an error, such as TensorFlow's; empty if it has none."""
    text = reason_of(error)
    return next((os.strerror(number) for number in _REMEDIES if os.strerror(number) in text), '')


def with_remedy(text: str, error: Exception) -> str:
    """Appends the remedy for `error`, if one is known, to a message."""
    remedy = remedy_of(error)
    return f'{text}. Fix: {remedy}' if remedy else text


def unreadable(path: str | os.PathLike[str], error: OSError) -> UsageError:
    """The error for a file or directory that cannot be read."""
    problem = _WRONG_KIND.get(error.errno or 0, f'cannot be read ({reason_of(error)})')
    return UsageError(f'{path}: {problem}. Fix: {remedy_of(error) or _CHECK}.')


def unwritable(path: str | os.PathLike[str], error: OSError, remedy: str = '') -> UsageError:
    """The error for a file or directory that cannot be written; default: `remedy_of` it."""
    fix = remedy or remedy_of(error) or _CHECK
    return UsageError(f'{path}: cannot be written ({reason_of(error)}). Fix: {fix}.')


def require_effect(given: Mapping[str, Any], needs: Mapping[str, tuple[str, Any]]) -> None:
    """Checks that each given flag has an effect.

    Args:
      given: values by flag; None: not given.
      needs: what a flag needs, as the user would add it, and whether that is there.

    Raises:
      UsageError: a flag has no effect.
    """
    for name, (needed, there) in needs.items():
        if (value := given.get(name)) is not None and not there:
            flag = f'--no-{name}' if value is False else f'--{name}'
            shown = flag if isinstance(value, bool) else f'{flag} {value}'
            raise UsageError(f'{shown}: no effect without {needed}. Fix: add that, or omit {flag}.')


def notes_on(error: BaseException) -> list[str]:
    """The sentences that `add_note` appended to an exception."""
    return getattr(error, '__notes__', [])


def one_line_errors(program: str, *others: type[Exception]) -> Callable[[Main], Main]:
    """Makes a `Main` report `UsageError` and `others` under the command's name.

    It then returns the error's `exit_code`, 2 for `others`. Notes on the exception end the line.
    """

    kinds: tuple[type[Exception], ...] = (UsageError, *others)

    def frame(main: Main) -> Main:
        @functools.wraps(main)
        def framed(argv: Sequence[str]) -> int:
            try:
                return main(argv)
            except kinds as error:
                print(f'{program}: {" ".join([str(error), *notes_on(error)])}', file=sys.stderr)
                return error.exit_code if isinstance(error, UsageError) else 2

        return framed

    return frame
