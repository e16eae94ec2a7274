"""What the tests of whole runs share."""

import pytest

from tests.end_to_end import launching


@pytest.fixture(autouse=True)
def no_run_is_left():
    yield
    while launching.STARTED:
        process = launching.STARTED.pop()
        process.kill()  # its workers and servers notice and exit
        process.wait(10)
