"""Values of single flags in a list of them, as a command line gives them."""

import argparse
from collections.abc import Sequence


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """The last value of a flag, given as `--flag=value` or `--flag value`; None: not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest='value')
    return parser.parse_known_args(list(flags))[0].value
