"""What nobody foresaw is told once and survived, but not for ever."""

import pytest

from infra.guard import Guard, UnforeseenError


def lines(guard, told, errors, **options):
    """Attempts an act that raises each of the errors in turn, None: none; what is told."""
    remaining = iter(errors)

    def act():
        error = next(remaining)
        if error is not None:
            raise error

    for _ in errors:
        guard.attempt(act, **options)
    return told


@pytest.fixture
def told():
    return []


def test_an_error_is_told_once_in_one_line_that_names_its_place(told, caplog):
    guard = Guard(told.append)
    (line,) = lines(guard, told, [KeyError('worker'), None, KeyError('a\nb')])
    assert line.startswith("launcher: KeyError: 'worker' (test_guard.py:")
    assert '\n' not in line
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert len(lines(guard, told, [ValueError('x' * 10_000)])[1]) < 400


def test_twenty_errors_of_one_act_in_a_row_are_in_vain(told):
    lines(Guard(told.append), told, ([ValueError('no')] * 19 + [None]) * 3)
    with pytest.raises(UnforeseenError, match='ValueError: no .*, 20 times in a row'):
        lines(Guard(told.append), told, [ValueError('no')] * 20)


def test_foreseen_errors_pass_and_at_any_rate_none_does(told):
    guard = Guard(told.append, (OSError,))
    with pytest.raises(BrokenPipeError):
        guard.attempt(lambda: lines(guard, told, [BrokenPipeError()]))
    assert told == []
    errors = [BrokenPipeError(), TimeoutError(), *[ValueError()] * 30]
    lines(guard, told, errors, at_any_rate=True)
    assert len(told) == 2  # of each kind the first, unless the caller has reported it


def test_one_reason_of_the_system_is_told_once_wherever_it_strikes(told):
    full = [OSError(28, 'No space left on device', name) for name in ('a', 'b')]

    def elsewhere():
        raise full[0]

    guard = Guard(told.append, (OSError,))
    guard.attempt(elsewhere, at_any_rate=True)
    (line,) = lines(guard, told, full, at_any_rate=True)
    assert 'No space left on device' in line
