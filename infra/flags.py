"""Command-line flags: texts in, values out or an error on one line."""

import argparse
import contextlib
import decimal
import math
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A command's parser that reports an invalid flag on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {with_fix(message, "see --help")}\n')


def with_fix(problem: object, remedy: str) -> str:
    """Appends a remedy to the text of an error that names none."""
    text = str(problem)
    return text if 'Fix: ' in text else f'{text.rstrip(".")}. Fix: {remedy}.'


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """The last value of `--flag=value` or `--flag value` in `flags`, None if it is absent."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest='value')
    return parser.parse_known_args(list(flags))[0].value


def add_shard_flags(
    parser: argparse.ArgumentParser, otherwise: str, text: str, period_seconds: float
) -> None:
    """Adds the flags that the servers of both kinds of shards share.

    Args:
      parser: of the server's command line.
      otherwise: alternative to --state_dir, for a shard whose state a run saves.
      text: help text of `otherwise`.
      period_seconds: default time between two states.
    """
    parser.add_argument(
        '--config', required=True, help='JSON file that `servers.py --config_dir` writes.'
    )
    parser.add_argument('--shard', type=integer, required=True, help='Index of this shard, from 0.')
    parser.add_argument('--port', type=integer, default=0, help='Port. Default: any free one.')
    parser.add_argument(
        '--ready_file',
        type=nonempty_path,
        help='JSON file to write when ready: {"port", "pid"}.',
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(otherwise, type=nonempty_path, help=text)
    place.add_argument(
        '--state_dir',
        type=nonempty_path,
        help='Directory for the state of this shard only: the shard starts from the newest state in'
        ' it and saves its state periodically and at SIGTERM. Use it under a supervisor.',
    )
    parser.add_argument(
        '--state_period_seconds',
        type=positive_number,
        default=period_seconds,
        help=f'Seconds between states with --state_dir. Default: {period_seconds:g}.',
    )


def integer(text: str) -> int:
    """Parses a 64-bit integer, also written `1e6` or `1_000_000`, for argparse.

    Raises:
      ArgumentTypeError: the text is not such a number.
    """
    with contextlib.suppress(ArithmeticError):
        number = decimal.Decimal(text)  # exact where a float is not
        if -(2**63) <= number < 2**63 and number == number.to_integral_value():
            return int(number)
    raise argparse.ArgumentTypeError(f'{text!r} is not a 64-bit integer')


def positive_number(text: str) -> float:
    """Parses a finite number above 0, for argparse.

    Raises:
      ArgumentTypeError: the text is not such a number.
    """
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')


def number_from_zero(text: str) -> float:
    """Parses a finite number of at least 0, for argparse.

    Raises:
      ArgumentTypeError: the text is not such a number.
    """
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 on')


def nonempty_path(text: str) -> str:
    """Parses a path, for argparse.

    Raises:
      ArgumentTypeError: the text is empty, which would mean the current directory.
    """
    if not text:
        raise argparse.ArgumentTypeError('empty. Fix: name a path.')
    return text


def nonempty(text: str) -> str:
    """Parses the text of an optional flag, for argparse.

    Raises:
      ArgumentTypeError: the text is blank, or a list of nothing, and would silently mean a default.
    """
    if not text.strip(' ,'):
        raise argparse.ArgumentTypeError('empty. Fix: give a value, or omit the flag.')
    return text


def as_flag(name: str, value: Any) -> str:
    """A setting as a command gives it: `--n_step 5`, `--double_dqn`, `--no-double_dqn`."""
    if isinstance(value, bool):
        return f'--{name}' if value else f'--no-{name}'
    return f'--{name} {value}'
