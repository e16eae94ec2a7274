"""Files in a place that Beam's file systems know, such as `gs://bucket/runs/pong`.

In: the place's address. Out: its files listed, read, written and deleted; whatever goes wrong there
is a `RemoteError` of one line. What the files mean is the business of others (`mirror.py`).
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

_PATTERN_SIGNS = re.compile(r'[*?\[\]]')  # Beam would look for names that match
_BLOCK_BYTES = 1 << 22
_ANSWER_SECONDS = 60.0  # Beam's client for Google's storage itself tries for two minutes
_REASON_CHARACTERS = 200
_LOGIN = (
    'run `gcloud auth application-default login`, or name a key in GOOGLE_APPLICATION_CREDENTIALS'
)
_ROLE = "give the account the bucket's role roles/storage.objectUser, or choose another --run_dir"

Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds since 1970, of a local file."""

_T = TypeVar('_T')


class RemoteError(Exception):
    """A remote place did not do what it was asked; one line naming place, reason and remedy."""


class MissingError(RemoteError):
    """There is no such remote file."""


def read_bytes(url: str) -> bytes:
    """The content of a small remote file.

    Raises:
      UsageError: the address is none, or there is no such file.
      RemoteError: it cannot be read.
    """
    folder, _, name = url.rpartition('/')
    content = Place.at(folder).read(name)
    if content is None:
        raise UsageError(f'{url}: no such file.')
    return content


@dataclasses.dataclass(frozen=True)
class Place:
    """A remote directory. Its files are named by their path below it, with slashes.

    Attributes:
      url: its address, without a slash at the end.
    """

    url: str

    @classmethod
    def at(cls, url: str, flags: Sequence[str] = ()) -> 'Place':
        """The place at an address; `flags` are Beam's, such as `--impersonate_service_account`.

        Raises:
          UsageError: Beam knows no such place, or no credentials are to be had for it.
        """
        scheme, _, path = url.partition('://')
        if not path.strip('/') or path.startswith('/') or _PATTERN_SIGNS.search(path):
            raise UsageError(
                f'{url}: no remote directory; write it as {scheme}://bucket/path, without *, ?, ['
                ' and ].'
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
        """The last part of the address."""
        return self.url.rpartition('/')[2]

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by name.

        Raises:
          RemoteError: they cannot be listed.
        """
        start = f'{self.url}/'
        with _translated(self.url):
            found = FileSystems.match([f'{start}**'])[0].metadata_list
        names = {entry.path.removeprefix(start): entry.size_in_bytes for entry in found}
        # Consoles mark a folder by an empty object whose name ends with a slash.
        return {name: size for name, size in names.items() if name and not name.endswith('/')}

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None when there is none.

        Raises:
          RemoteError: it cannot be read.
        """
        try:
            with self._reading(name), self._open(name) as file:
                return file.read()
        except MissingError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a small file.

        Raises:
          RemoteError: it cannot be written.
        """
        with self._written(name) as write:
            write(content)

    def send(self, source: pathlib.Path, name: str, beat: Callable[[], None]) -> Stamp | None:
        """Copies a local file there as it is now, in blocks, `beat` called after each.

        Returns its stamp, None when there is no such local file any more.

        Raises:
          RemoteError: it cannot be written there; what was there before stays.
          OSError: the local file cannot be read; likewise.
        """
        try:
            file = source.open('rb')
        except FileNotFoundError:
            return None
        with file, self._written(name) as write:
            status = os.fstat(file.fileno())
            left = status.st_size  # what is appended meanwhile comes with the next copy
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                write(block)
                left -= len(block)
                beat()
        return status.st_size, status.st_mtime_ns

    def fetch(self, name: str, target: pathlib.Path, beat: Callable[[], None]) -> Stamp:
        """Copies a file from there, in blocks, `beat` called after each; returns the copy's stamp.

        Raises:
          MissingError: there is none, or it was replaced meanwhile.
          RemoteError: it cannot be read.
          OSError: the local file cannot be written.
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
        """Deletes files; that one is not there is no error.

        Raises:
          RemoteError: one cannot be deleted.
        """
        with _translated(self.url):
            paths = [f'{self.url}/{name}' for name in names]
            try:
                FileSystems.delete(paths)
            except Exception:  # in some file systems also when there is no such file
                if any(FileSystems.exists(path) for path in paths):
                    raise

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """`_translated`, where the file may be missing."""
        try:
            with _translated(self.url):
                yield
        except RemoteError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError) or _status(cause) == 404:
                raise MissingError(f'{self.url}/{name}: no such file.') from cause
            raise

    def _open(self, name: str) -> Any:
        uncompressed = CompressionTypes.UNCOMPRESSED  # whatever the name ends with
        return FileSystems.open(f'{self.url}/{name}', compression_type=uncompressed)

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """A function that appends to a new file, which is complete when the block is left."""
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
    """Ends an upload and makes no file of the part that was sent.

    Google's client 2.19 knows no such thing: closing, which Python does with whatever nobody holds
    any more, makes one, unless the writer's buffer is closed already.
    """
    buffer = getattr(writer, '_buffer', None)
    if buffer is not None:
        buffer.close()
    else:
        with contextlib.suppress(Exception):
            writer.close()


def within(seconds: float, url: str, ask: Callable[[], _T]) -> _T:
    """What `ask` returns or raises, if it does so in time; else it is left to itself.

    Raises:
      RemoteError: it does not.
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
        raise RemoteError(f'{url}: no answer within {seconds:g} s; see that the network is up.')
    if errors:
        raise errors[0]
    return results[0]


def require_answer(place: Place) -> dict[str, int]:
    """`place.files()`, asked for the first time.

    Raises:
      UsageError: no answer, or a refusal; the message names the reason and the remedy.
    """
    try:
        return within(_ANSWER_SECONDS, place.url, place.files)
    except RemoteError as error:
        raise UsageError(str(error)) from error


def _unknown(url: str, scheme: str, known: set[str]) -> str:
    """What to say of a scheme that none of Beam's file systems, of schemes `known`, has."""
    if scheme == 'gs':
        return (
            f"{url}: Beam's part for Google's storage is missing; `pip install apache-beam[gcp]`."
        )
    return (
        f'{url}: no file system of Beam has {scheme}://; there are'
        f' {", ".join(sorted(f"{name}://" for name in known))}. Others come with extras of'
        ' apache-beam, such as [aws] and [azure].'
    )


def _require_credentials(url: str) -> None:
    """Raises UsageError when there are none; Beam would go on without, after half a minute."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    # They are about a project, which storage needs for nothing that is done here.
    logging.getLogger('google.auth').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='google.auth')
    if os.environ.get('STORAGE_EMULATOR_HOST'):
        return  # an emulator may want none
    try:
        google.auth.default()
    except GoogleAuthError as error:
        raise UsageError(f'{url}: no credentials ({_first_line(error)}); {_LOGIN}.') from error


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Inside it every error is the remote side's; it leaves as a RemoteError."""
    try:
        yield
    except Exception as error:  # each file system has its own
        raise RemoteError(_told(url, error)) from error


def _told(url: str, error: BaseException) -> str:
    """One line: place, reason, remedy."""
    bucket = '/'.join(url.split('/')[:3])
    cause, status = _cause(error), _status(error)
    if status == 404:
        return f'{url}: there is no bucket {bucket}; make it, or choose another --run_dir.'
    if status == 403:
        return f'{url}: {bucket} may not be read and written (403); {_ROLE}.'
    if status == 401 or 'google.auth' in type(cause).__module__:
        return f'{url}: the credentials are not accepted ({_first_line(cause)}); {_LOGIN}.'
    return f'{url}: {_first_line(cause)}; see that the address is right and the network is up.'


def _cause(error: BaseException) -> BaseException:
    """The error that Beam's own, and those of retries, are wrapped around."""
    details = getattr(error, 'exception_details', None)
    inner = next(iter(details.values()), None) if details else getattr(error, 'cause', None)
    return _cause(inner) if isinstance(inner, BaseException) else error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, None when there is none."""
    if error is None:
        return None
    cause = _cause(error)
    details = getattr(cause, 'exception_details', None)  # of a deletion: the status itself
    response = getattr(cause, 'response', None)
    found = (
        next(iter(details.values()), None) if details else None,
        getattr(cause, 'code', None),
        getattr(response, 'status_code', None),
    )
    return next((int(status) for status in found if isinstance(status, int)), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ['']
    text = lines[0].rpartition('Caused by ')[2]  # of a connection: the reason, not the request
    return f'{type(error).__name__}: {text[:_REASON_CHARACTERS].rstrip(".")}'
