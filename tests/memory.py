"""What calls leave behind in Python's memory."""

import gc
import sys
from collections.abc import Callable

_ROUNDS = 8


def blocks_kept(call: Callable[[], object], calls: int) -> int:
    """Memory blocks that `calls` calls leave behind, in the round that leaves fewest: what the
    interpreter and the libraries keep for themselves they keep in the first rounds."""
    kept = []
    for _ in range(_ROUNDS):
        before = _blocks()
        for _ in range(calls):
            call()
        kept.append(_blocks() - before)
    return min(kept)


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()
