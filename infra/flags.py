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


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse.

    Raises:
      ArgumentTypeError: it is another text.
    """
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is no number above 0')
