"""Values of single flags in a list of them, as a command line gives them."""

import argparse
from collections.abc import Sequence


def values_of(flag: str, flags: Sequence[str]) -> list[str]:
    """All values of a flag, given as `--flag=value` or `--flag value`, in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest='values', action='append', default=[])
    return parser.parse_known_args(list(flags))[0].values


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """The value of a flag that counts, the last one; None: it is not given."""
    values = values_of(flag, flags)
    return values[-1] if values else None
