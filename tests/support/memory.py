"""What calls leave behind in Python's memory."""

import gc
import sys
from collections.abc import Callable

_ROUNDS = 8
_MOST_ROUNDS = 24  # until one leaves few


def blocks_kept(call: Callable[[], object], calls: int, few: int = 0) -> int:
    """Memory blocks that `calls` calls leave behind, in the round that leaves fewest: what the
    interpreter and the libraries keep for themselves they keep in the first rounds. Ends with the
    first round that leaves fewer than `few`."""
    kept = []
    for _ in range(_MOST_ROUNDS if few else _ROUNDS):
        before = _blocks()
        for _ in range(calls):
            call()
        kept.append(_blocks() - before)
        if kept[-1] < few:
            break
    return min(kept)


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()
