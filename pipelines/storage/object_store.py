"""Files in a remote directory such as `gs://bucket/runs/pong`, through Beam's file systems.

In: its URL. Out: its files listed, read, written and deleted; each failure is a `RemoteError` of
one line. What the files mean is not known here.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from apache_beam.io.filesystem import CompressionTypes, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.errors import UsageError

_PATTERN_SIGNS = re.compile(r'[*?\[\]]')  # Beam would expand them
_BLOCK_BYTES = 1 << 22
_ANSWER_SECONDS = 60.0  # Google's own client retries for two minutes
_REASON_CHARACTERS = 200
_LOGIN = (
    'run `gcloud auth application-default login`, or name a key in GOOGLE_APPLICATION_CREDENTIALS'
)
_ROLE = 'grant the account roles/storage.objectUser on the bucket, or choose another --run_dir'

Stamp = tuple[int, int]
"""Size in bytes and modification time in nanoseconds since 1970, of a local file."""

_T = TypeVar('_T')


class RemoteError(Exception):
    """A remote operation failed; one line with URL, reason and remedy."""


class MissingError(RemoteError):
    """The remote file does not exist."""


def read_bytes(url: str) -> bytes:
    """The content of a small remote file.

    Raises:
      UsageError: the URL is malformed or the file does not exist.
      RemoteError: the file is not readable.
    """
    folder, _, name = url.rpartition('/')
    content = Place.at(folder).read(name)
    if content is None:
        raise UsageError(f'{url}: no such file. Fix: check the URL.')
    return content


@dataclasses.dataclass(frozen=True)
class Place:
    """A remote directory. A file's name is its path below it, with slashes.

    Attributes:
      url: of the directory, without a trailing slash.
    """

    url: str

    @classmethod
    def at(cls, url: str, flags: Sequence[str] = ()) -> 'Place':
        """The directory at `url`; `flags` are Beam's, such as `--impersonate_service_account`.

        Raises:
          UsageError: Beam has no file system for it, or there are no credentials.
        """
        scheme, _, path = url.partition('://')
        if not path.strip('/') or path.startswith('/') or _PATTERN_SIGNS.search(path):
            raise UsageError(
                f'{url}: not a remote directory. Fix: write it as {scheme}://bucket/path, without'
                ' *, ?, [ and ].'
            )
        known = {system.scheme() for system in FileSystem.get_all_subclasses()} - {None}
        if scheme not in known:
            raise UsageError(_unknown(url, scheme, known))
        FileSystems.set_options(PipelineOptions(list(flags)))
        if scheme == 'gs':
            _require_credentials(url)
        return cls(url.rstrip('/'))

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition('/')[2]

    def files(self) -> dict[str, int]:
        """Sizes of all files in bytes, by name.

        Raises:
          RemoteError: the directory cannot be listed.
        """
        start = f'{self.url}/'
        with _translated(self.url):
            found = FileSystems.match([f'{start}**'])[0].metadata_list
        names = {entry.path.removeprefix(start): entry.size_in_bytes for entry in found}
        # Consoles mark a folder by an empty object whose name ends with a slash.
        return {name: size for name, size in names.items() if name and not name.endswith('/')}

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if it does not exist.

        Raises:
          RemoteError: the file is not readable.
        """
        try:
            with self._reading(name), self._open(name) as file:
                return file.read()
        except MissingError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces a small file.

        Raises:
          RemoteError: the file is not writable.
        """
        with self._written(name) as write:
            write(content)

    def send(self, source: pathlib.Path, name: str, beat: Callable[[], None]) -> Stamp | None:
        """Uploads a local file in its current size, in blocks, calling `beat` after each.

        Returns its stamp, None if the local file no longer exists.

        Raises:
          RemoteError: the remote file is not writable; the previous one stays.
          OSError: the local file is not readable; likewise.
        """
        try:
            file = source.open('rb')
        except FileNotFoundError:
            return None
        with file, self._written(name) as write:
            status = os.fstat(file.fileno())
            left = status.st_size  # the next upload has what is appended meanwhile
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                write(block)
                left -= len(block)
                beat()
        return status.st_size, status.st_mtime_ns

    def fetch(self, name: str, target: pathlib.Path, beat: Callable[[], None]) -> Stamp:
        """Downloads a file in blocks, calling `beat` after each; returns the copy's stamp.

        Raises:
          MissingError: the file does not exist, or was replaced meanwhile.
          RemoteError: the file is not readable.
          OSError: the local file is not writable.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open('wb') as file:
            with self._reading(name):
                source = self._open(name)
            with source:
                while True:
                    with self._reading(name):
                        block = source.read(_BLOCK_BYTES)
                    if not block:
                        break
                    file.write(block)
                    beat()
        status = target.stat()
        return status.st_size, status.st_mtime_ns

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files; a missing one is no error.

        Raises:
          RemoteError: a file cannot be deleted.
        """
        with _translated(self.url):
            paths = [f'{self.url}/{name}' for name in names]
            try:
                FileSystems.delete(paths)
            except Exception:  # some file systems raise for a missing file
                if any(FileSystems.exists(path) for path in paths):
                    raise

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """`_translated`, with `MissingError` if the file does not exist."""
        try:
            with _translated(self.url):
                yield
        except RemoteError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError) or _status(cause) == 404:
                raise MissingError(f'{self.url}/{name}: no such file.') from cause
            raise

    def _open(self, name: str) -> Any:
        uncompressed = CompressionTypes.UNCOMPRESSED  # whatever its suffix
        return FileSystems.open(f'{self.url}/{name}', compression_type=uncompressed)

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Yields a function that appends to a new file, which exists from the end of the block."""
        path = f'{self.url}/{name}'
        with _translated(self.url):
            writer = FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)

        def write(block: bytes) -> None:
            with _translated(self.url):
                writer.write(block)

        try:
            yield write
            with _translated(self.url):
                writer.close()
        except BaseException:
            _abandon(writer)
            raise


def _abandon(writer: Any) -> None:
    """Ends an upload without creating a file from the part that was sent.

    Google's client 2.19 cannot abort: closing its writer creates the file, and so does garbage
    collection, unless the writer's buffer is closed first.
    """
    buffer = getattr(writer, '_buffer', None)
    if buffer is not None:
        buffer.close()
    else:
        with contextlib.suppress(Exception):
            writer.close()


def within(seconds: float, url: str, ask: Callable[[], _T]) -> _T:
    """Returns or raises what `ask` does; leaves it running in a thread when the time is up.

    Raises:
      RemoteError: the time is up.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name='within', daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise RemoteError(f'{url}: no answer within {seconds:g} s. Fix: check the network.')
    if errors:
        raise errors[0]
    return results[0]


def require_answer(place: Place) -> dict[str, int]:
    """`place.files()`, as the first operation on a remote directory.

    Raises:
      UsageError: the directory does not answer or cannot be listed.
    """
    try:
        return within(_ANSWER_SECONDS, place.url, place.files)
    except RemoteError as error:
        raise UsageError(str(error)) from error


def _unknown(url: str, scheme: str, known: set[str]) -> str:
    """The message for a scheme that is not among the `known` ones of Beam's file systems."""
    if scheme == 'gs':
        return f'{url}: Beam lacks its Google extra. Fix: `pip install apache-beam[gcp]`.'
    names = ', '.join(sorted(f'{name}://' for name in known))
    return (
        f'{url}: Beam has no file system for {scheme}:// (it has {names}). Fix: choose another'
        ' --run_dir, or install an extra of apache-beam, such as [aws] or [azure].'
    )


def _require_credentials(url: str) -> None:
    """Raises UsageError if there are none; Beam would continue without, after half a minute."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    # Its warnings are about a project, which is not needed here.
    logging.getLogger('google.auth').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='google.auth')
    if os.environ.get('STORAGE_EMULATOR_HOST'):
        return  # an emulator may need none
    try:
        google.auth.default()
    except GoogleAuthError as error:
        raise UsageError(f'{url}: no credentials ({_first_line(error)}). Fix: {_LOGIN}.') from error


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Raises every error of the block as a RemoteError."""
    try:
        yield
    except Exception as error:  # each file system has its types
        raise RemoteError(_describe(url, error)) from error


def _describe(url: str, error: BaseException) -> str:
    """One line: URL, reason, remedy."""
    bucket = '/'.join(url.split('/')[:3])
    cause, status = _cause(error), _status(error)
    if status == 404:
        return f'{url}: no bucket {bucket}. Fix: create it, or choose another --run_dir.'
    if status == 403:
        return f'{url}: access to {bucket} denied (403). Fix: {_ROLE}.'
    if status == 401 or 'google.auth' in type(cause).__module__:
        return f'{url}: credentials rejected ({_first_line(cause)}). Fix: {_LOGIN}.'
    return f'{url}: {_first_line(cause)}. Fix: check the URL and the network.'


def _cause(error: BaseException) -> BaseException:
    """The error inside the wrappers of Beam and of retries."""
    details = getattr(error, 'exception_details', None)
    inner = next(iter(details.values()), None) if details else getattr(error, 'cause', None)
    return _cause(inner) if isinstance(inner, BaseException) else error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, None if there is none."""
    if error is None:
        return None
    cause = _cause(error)
    details = getattr(cause, 'exception_details', None)  # of a deletion: statuses
    response = getattr(cause, 'response', None)
    found = (
        next(iter(details.values()), None) if details else None,
        getattr(cause, 'code', None),
        getattr(response, 'status_code', None),
    )
    return next((int(status) for status in found if isinstance(status, int)), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ['']
    text = lines[0].rpartition('Caused by ')[2]  # a connection's reason, not its request
    return f'{type(error).__name__}: {text[:_REASON_CHARACTERS].rstrip(".")}'
