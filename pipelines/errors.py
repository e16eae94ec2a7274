"""An error of the user's, and how every command reports it: one line, exit code 2."""

import functools
import sys
from collections.abc import Callable, Sequence

Main = Callable[[Sequence[str]], int]
"""Runs a command: arguments in, exit code out."""


class UsageError(Exception):
    """A mistake the user can fix; the message is one line that names value and remedy."""


def one_line_errors(program: str, *others: type[Exception]) -> Callable[[Main], Main]:
    """Makes a `Main` report `UsageError` and `others` under the command's name, and return 2."""

    kinds: tuple[type[Exception], ...] = (UsageError, *others)

    def frame(main: Main) -> Main:
        @functools.wraps(main)
        def framed(argv: Sequence[str]) -> int:
            try:
                return main(argv)
            except kinds as error:
                print(f'{program}: {error}', file=sys.stderr)
                return 2

        return framed

    return frame
