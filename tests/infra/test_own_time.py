"""Own time: what a process that stood still must not hold against others."""

import pytest

from infra.own_time import OwnTime, Silences


@pytest.fixture
def clock():
    """An own time, and the world's, which the test sets."""
    world = [100.0]
    return OwnTime(lambda: world[0]), world


def test_own_time_passes_as_the_worlds_while_it_is_looked_at(clock):
    own_time, world = clock
    for _ in range(10):
        world[0] += 7.5
        own_time.look()
    assert own_time.seconds == 75.0


def test_a_standstill_counts_no_more_than_a_look(clock):
    own_time, world = clock
    world[0] += 3600.0
    assert own_time.look() == 10.0
    world[0] += 1.0
    assert own_time.look() == 11.0


def test_time_that_does_not_count_is_left_out(clock):
    own_time, world = clock
    for counts in (True, False, False, True):
        world[0] += 2.0
        own_time.look(counts)
    assert own_time.seconds == 4.0


def test_a_silence_lasts_from_the_first_question_without_an_answer():
    silences = Silences()
    assert silences.see('a', False, 10.0) == 0.0
    assert silences.see('a', False, 12.0) == 2.0
    assert silences.see('b', False, 13.0) == 0.0
    silences.restart('a', 12.0)
    assert silences.see('a', False, 15.0) == 3.0
    assert silences.see('a', True, 16.0) == 0.0
    assert silences
    silences.see('b', True, 16.0)
    assert not silences
