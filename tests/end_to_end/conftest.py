"""The longest end-to-end tests of all rooms start first, so that the suite does not end on one."""

import pytest

from tests.end_to_end import launching

_LONGEST_FIRST = (
    'test_the_dask_overlays_commands_train',
    'test_an_interrupted_run_at_a_bucket',
    'test_dask_replaces_killed_workers',
    'test_servers_actor_and_learner_on_three_hosts',
    'test_bundles_train_on_a_job_server',
    'test_all_parts_of_the_family',
    'test_killed_bundle_and_shard',
)


def pytest_collection_modifyitems(items):
    def place(item):
        begins = (place for place, name in enumerate(_LONGEST_FIRST) if item.name.startswith(name))
        return next(begins, len(_LONGEST_FIRST))

    items.sort(key=place)
    # Each of the three processes gets two tests at the start: a long one and the one after it.
    for index in (1, 3, 5):
        if len(items) > index:
            items.insert(index, items.pop())


@pytest.fixture(autouse=True)
def no_run_is_left():
    yield
    while launching.STARTED:
        process = launching.STARTED.pop()
        process.kill()  # its workers and servers notice and exit
        process.wait(10)
