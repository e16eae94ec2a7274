"""Values of single flags: taken from a list of them, or checked."""

import argparse
import contextlib
import math
from collections.abc import Sequence


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """The last value of a flag, given as `--flag=value` or `--flag value`; None: not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest='value')
    return parser.parse_known_args(list(flags))[0].value


def add_state_flags(
    parser: argparse.ArgumentParser, otherwise: str, text: str, period_seconds: float
) -> None:
    """Adds the flags of a shard that keeps its own state.

    Args:
      parser: of the shard's command line.
      otherwise: the flag that excludes them, of a shard whose state a run keeps; `text`: its help.
      period_seconds: between two states by default.
    """
    place = parser.add_mutually_exclusive_group()
    place.add_argument(otherwise, help=text)
    place.add_argument(
        '--state_dir',
        help="directory of this shard's own: it starts from the newest state there, and writes it"
        ' now and then and at SIGTERM; for a shard that a supervisor starts again',
    )
    parser.add_argument(
        '--state_period_seconds',
        type=positive_number,
        default=period_seconds,
        help=f'between two states [{period_seconds:g}]',
    )


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse.

    Raises:
      ArgumentTypeError: it is another text.
    """
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is no number above 0')
