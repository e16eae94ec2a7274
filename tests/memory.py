"""What calls leave behind in Python's memory."""

import gc
import sys
from collections.abc import Callable

_WARM_UP = 300


def blocks_kept(call: Callable[[], object], calls: int) -> int:
    """Memory blocks that `calls` calls leave behind; a few are the interpreter's own caches."""
    for _ in range(_WARM_UP):
        call()
    before = _blocks()
    for _ in range(calls):
        call()
    return _blocks() - before


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()
