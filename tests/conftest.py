"""Settings of the tests and of the processes they start, made before TensorFlow is loaded."""

import os

import pytest

# Byte-code halves the time each server and worker needs to import TensorFlow.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# The suite must pass on two cores, beside the servers it starts; and without an accelerator.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
os.environ.setdefault('TF_NUM_INTEROP_THREADS', '1')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
os.environ.setdefault('MPLBACKEND', 'Agg')


_ENGINES = 'end_to_end/test_engines.py'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of engines last, and starts to build what they need."""
    items.sort(key=lambda item: _ENGINES in item.nodeid)
    if items and _ENGINES in items[-1].nodeid:
        from tests import engines

        engines.start_to_build_prism()
