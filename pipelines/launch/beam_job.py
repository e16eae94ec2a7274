"""Runs a Beam pipeline to its end, and ends a job that would outlive this process."""

import contextlib
import functools
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam

from infra.disk import write_atomically
from infra.output import last_words
from pipelines.engines.catalog import Engine
from pipelines.launch.interrupts import Ended, ended_before, handled, raise_ended


def end_with_workers(
    count: int,
    worked: Callable[[], bool] = lambda: False,
    end: Callable[[], None] = lambda: os._exit(1),
) -> None:
    """Calls `end` after `count` worker processes of Beam's local runner have failed.

    The runner waits for ever for a process that fails before it connects; only the thread that
    watches the process raises an error. After `worked()` the runner itself reports failures.

    Args:
      count: of worker processes.
      worked: whether one of them has done some work.
      end: ends this process, from another thread.
    """
    failed: list[str] = []
    otherwise = threading.excepthook

    def note(args: Any) -> None:
        if args.thread is None or args.thread.name != 'run_worker':
            otherwise(args)
            return
        failed.append(f'worker process {len(failed) + 1} of {count} failed: {args.exc_value}')
        print(failed[-1], file=sys.stderr, flush=True)
        if len(failed) >= count and not worked():
            end()

    threading.excepthook = note


def run(
    pipeline: beam.Pipeline, options: Any, engine: Engine, state_file: pathlib.Path | None = None
) -> Any:
    """Runs a job and returns its result; a signal also ends a job that would outlive this process.

    Args:
      pipeline: to run, with `options`.
      options: of Beam.
      engine: that runs it.
      state_file: receives the engine's reports on the job.

    Raises:
      Ended: a signal ended the job.
    """
    if not engine.outlives_submitter:
        result = pipeline.run()
        result.wait_until_finish()
        return result
    with _submitting() as noted:
        result = pipeline.run()
        with handled(raise_ended):
            try:
                if noted:
                    raise_ended(noted[0])
                if engine.follow is not None and state_file is not None:
                    report = functools.partial(write_atomically, state_file)
                    follow = functools.partial(engine.follow, result, options, report)
                    threading.Thread(target=follow, daemon=True).start()
                result.wait_until_finish()
            except BaseException as error:  # the runner's clean-up may replace `Ended`
                if ended_before(error) is not None:
                    print('ending the job ...', flush=True)
                    engine.end(result, options)
                raise
    return result


@contextlib.contextmanager
def _submitting() -> Iterator[list[int]]:
    """Yields the signals that have come: a job that is submitted by halves could not be ended.

    Ctrl-C after it ends the process. If the submission fails after a signal, that is its end.
    """
    noted: list[int] = []

    def note(number: int, _frame: Any) -> None:
        noted.append(number)
        if len(noted) > 1 and number == signal.SIGINT:  # the launcher repeats SIGTERM
            last_words(sys.stderr, f'{signal.Signals(number).name} again: stopped at once\n')
            os._exit(128 + number)
        if len(noted) == 1:
            text = 'the job will be ended as soon as it is submitted'
            last_words(sys.stderr, f'{signal.Signals(number).name}: {text}\n')

    with handled(note):
        try:
            yield noted
        except Exception as error:
            if noted and ended_before(error) is None:
                raise Ended(noted[0]) from error
            raise
