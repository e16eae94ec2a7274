"""A setting that changes linearly with the run's global updates."""


def linear(start: float, end: float, updates: int, over: int) -> float:
    """The value after `updates`: `start` at first, `end` from `over` updates on."""
    progress = min(updates / max(over, 1), 1.0)
    return start + progress * (end - start)
