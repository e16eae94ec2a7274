"""Signals that ask a command to end: Ctrl-C, SIGTERM, and SIGHUP from a closed terminal."""

import contextlib
import dataclasses
import functools
import os
import queue
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from infra.disk import is_remote
from infra.output import last_words
from infra.process import end_signals
from pipelines.errors import Main, UsageError, notes_on
from pipelines.storage.resuming import resuming
from pipelines.storage.run_directory import RunDirectory

# Beam and TensorFlow take seconds to import, and the first signals come before they are.
if TYPE_CHECKING:
    from pipelines.experiment.launch import Launch
    from pipelines.monitoring.display import Display
    from pipelines.storage.remote_run import RemoteRun


_TELL_SECONDS = 5.0  # a terminal that pauses
_FIRST_SECONDS = 0.1  # until `Ended` is raised that an import delayed or a callback lost
_AGAIN_SECONDS = 1.0  # until it is raised again
_IMPORTER = '<frozen importlib._bootstrap>'  # in the stack of all code that an import runs


_before: list[Callable[[int], object]] = []
"""What is done, given the signal's number, before `Ended` is raised; see `before_end`."""
_blocks = 0  # of `handled`, one in another


class Ended(BaseException):
    """Raised on a signal that requests the end; not an `Exception`, since Beam catches those.

    Attributes:
      exit_code: of the command that ends so.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def raise_ended(number: int = signal.SIGTERM, frame: types.FrameType | None = None) -> None:
    """A handler: raises `Ended` in the main thread; a second SIGINT ends the process.

    Waits for the end of an import, which may turn the exception into another one or print it.
    Raises it again if it was lost, as in a finalizer or a callback of C code, until the end of the
    `handled` block; never during the clean-up that it leads to.
    """
    for other in end_signals():
        signal.signal(other, signal.SIG_IGN)  # the end takes seconds
    signal.signal(signal.SIGINT, _end_at_once)
    signal.signal(signal.SIGALRM, lambda _, later: _raise_once(number, later))
    signal.setitimer(signal.ITIMER_REAL, _FIRST_SECONDS, _AGAIN_SECONDS)
    _raise_once(number, frame)


def _end_at_once(number: int, _frame: types.FrameType | None) -> None:
    last_words(sys.stderr, f'{signal.Signals(number).name} again: stopped at once\n')
    os._exit(128 + number)


def _raise_once(number: int, frame: types.FrameType | None) -> None:
    handled_now = sys.exception()  # `GeneratorExit` closes a generator during a clean-up
    cleans_up = isinstance(handled_now, GeneratorExit) or ended_before(handled_now) is not None
    if not _is_import(frame) and not cleans_up:
        for act in _before:
            act(number)
        raise Ended(number)


def ended_before(error: BaseException | None) -> Ended | None:
    """The `Ended` during whose handling an error arose; None if there was no signal."""
    while error is not None and not isinstance(error, Ended):
        error = error.__context__
    return error


def _is_import(frame: types.FrameType | None) -> bool:
    """Whether the code that runs in `frame` belongs to an import."""
    while frame is not None and frame.f_code.co_filename != _IMPORTER:
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def before_end(act: Callable[[int], object]) -> Iterator[None]:
    """Calls `act` with the number of a signal for which `Ended` is raised in the block, before.

    Whenever that is: an import may delay it, and it is raised again if it was lost.
    """
    _before.append(act)
    try:
        yield
    finally:
        _before.remove(act)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Calls `handler` on each signal that asks for the end; restores the handlers before it."""
    global _blocks
    numbers = (signal.SIGINT, *end_signals())
    before = {number: signal.signal(number, handler) for number in numbers}
    alarm = signal.getsignal(signal.SIGALRM)
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:  # a signal that came in an inner block may still be delayed
            signal.setitimer(signal.ITIMER_REAL, 0)  # of `raise_ended`
            signal.signal(signal.SIGALRM, alarm)
        for number, previous in before.items():
            signal.signal(number, previous)


def stoppable(program: str, kept: str) -> Callable[[Main], Main]:
    """Makes a `Main` end on a signal: cleans up, prints what is kept, returns 128 + its number.

    The signal raises `Ended`. A library may turn that into another exception, so any exception
    after a signal counts as `Ended`.

    Args:
      program: name of the command.
      kept: sentence on its results; notes on the exception (`add_note`) replace it.
    """

    def frame(main: Main) -> Main:
        @functools.wraps(main)
        def framed(argv: Sequence[str]) -> int:
            received: list[int] = []

            def end(number: int, frame: Any) -> None:
                received.append(number)
                raise_ended(number, frame)

            with handled(end):
                try:
                    return main(argv)
                except BaseException as error:
                    if isinstance(error, Ended):  # of another handler, such as a Beam job's
                        received.append(error.exit_code - 128)
                    if not received:
                        raise
                    signal.setitimer(signal.ITIMER_REAL, 0)  # of `raise_ended`
                    name = signal.Signals(received[0]).name
                    words = [f'{program}: {name}: stopped.', *(notes_on(error) or [kept])]
                    _release(error)
                    print(*words, file=sys.stderr, flush=True)
                    return 128 + received[0]

        return framed

    return frame


def _release(error: BaseException) -> None:
    """Releases what the frames of an error hold; half-made objects complain to nobody."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    traceback.clear_frames(error.__traceback__)
    sys.unraisablehook = hook


class StartUp:
    """Ends the process at once on a signal, until the work starts. A context manager.

    Nothing of a new run or suite remains. Exits without raising, since an import would turn the
    exception into another one.

    Attributes:
      directory: of the run or suite; it removes itself after a `UsageError` if it is new. None
        before it is open.
      remote: the run's remote place, released at the end; None for a local run.
      launched: whether the work has started; what it wrote then remains.
    """

    def __init__(
        self, program: str = 'run.py', then: Callable[[int, Any], None] | None = None
    ) -> None:
        """`program` names the command; `then` is the handler once `launched`. Default: exits."""
        self._program, self._then = program, then
        self.directory: contextlib.AbstractContextManager[Any] | None = None
        self.remote: RemoteRun | None = None
        self.launched = False
        self._handled = handled(self._end)

    def __enter__(self) -> 'StartUp':
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.remote is not None:
            self.remote.close()
        self._handled.__exit__(*exception)

    def localized(self, launch: 'Launch') -> 'Launch':
        """Returns the launch with a local directory. Claims a remote place; fetches a resumed run.

        Raises:
          UsageError: the remote place is unreachable or in use.
        """
        url = launch.run_dir or ''
        if not is_remote(url):
            return launch
        from pipelines.storage.remote_run import RemoteRun

        print(f'asking {url} ...', flush=True)
        self.remote = RemoteRun(url, launch.work_dir, launch.beam_flags)
        local = self.remote.open(launch.resume, lambda text: print(text, flush=True))
        return dataclasses.replace(launch, run_dir=str(local))

    def _end(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.launched and self._then is not None:
            self._then(number, frame)
            return
        if self.launched:
            last_words(sys.stdout, f'{self._program}: {name}: stopped at once, after the run\n')
            os._exit(128 + number)
        if self.directory is not None:
            # As after a `UsageError`: removes a directory that is new and unused.
            self.directory.__exit__(UsageError, UsageError(name), None)
        if self.remote is not None:
            self.remote.close()
        last_words(sys.stdout, f'{self._program}: {name}: stopped before anything was started\n')
        os._exit(128 + number)


class Signals:
    """Records and acknowledges the first signal; a second one ends the process at once.

    A context manager. A thread acknowledges: the handler may have interrupted a print, and the main
    thread may wait for a server.

    Attributes:
      received: number of the first signal, None before it.
      effect: what a first signal leads to now.
    """

    def __init__(self, display: 'Display', directory: RunDirectory) -> None:
        self._display = display
        self._directory = directory
        self._handled = handled(self._note)
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()  # `put` is reentrant
        self._acknowledging = threading.Thread(target=self._acknowledge, daemon=True)
        self.received: int | None = None
        self.effect = 'stopping'

    def __enter__(self) -> 'Signals':
        self._acknowledging.start()
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handled.__exit__(*exception)
        self._texts.put('')
        self._acknowledging.join(_TELL_SECONDS)

    def _acknowledge(self) -> None:
        while text := self._texts.get():
            self._display.message(text)

    @property
    def name(self) -> str:
        """Name of the signal received, empty before it."""
        return signal.Signals(self.received).name if self.received else ''

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP and self.received is not None:
            return  # a closing terminal sends it more than once
        if self.received not in (None, signal.SIGHUP):
            try:
                self._display.abandon(f'{signal.Signals(number).name} again: {self._loss()}')
            finally:
                os._exit(128 + number)  # the child processes find their parent dead and end too
        if self.received is None:
            self._texts.put(f'{signal.Signals(number).name}: {self.effect}')
        self.received = number

    def _loss(self) -> str:
        without = f'without a checkpoint; logs: {self._directory.logs}'
        return f'stopped at once; {resuming(self._directory) or without}'
