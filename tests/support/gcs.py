"""Google's object storage on this machine: an HTTP endpoint that its real client talks to.

The objects are kept by the package gcp-storage-emulator; what is added here is a log of what was
written and deleted, a check of the credentials, and failures on demand.
"""

import functools
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

from gcp_storage_emulator.handlers import buckets  # type: ignore[import-untyped]
from gcp_storage_emulator.server import RequestHandler  # type: ignore[import-untyped]
from gcp_storage_emulator.storage import Storage  # type: ignore[import-untyped]

BUCKET = 'lab'
_TOKEN = 'a-token'


class _Logged(Storage):
    """Keeps the order of changes, as ('put' or 'delete', name)."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.changes: list[tuple[str, str]] = []

    def create_file(self, bucket_name: str, file_name: str, *args: Any, **kwargs: Any) -> None:
        super().create_file(bucket_name, file_name, *args, **kwargs)
        self.changes.append(('put', file_name))

    def delete_file(self, bucket_name: str, file_name: str) -> None:
        super().delete_file(bucket_name, file_name)
        self.changes.append(('delete', file_name))


class Gcs:
    """A context manager; inside it the endpoint serves the one bucket `lab`.

    Attributes:
      refuse: the HTTP status to answer a request with instead, by its method and its address with
        the object's name in it; None: none.
    """

    def __init__(self) -> None:
        self.refuse: Callable[[str, str], int | None] = lambda method, address: None
        self.storage = _Logged()
        self.lock = threading.Lock()
        buckets.create_bucket(BUCKET, self.storage)
        self._port = 0

    def environment(self, directory: pathlib.Path) -> dict[str, str]:
        """Variables that lead Google's client here; its credentials are put into `directory`."""
        credentials = {
            'type': 'authorized_user',
            'client_id': 'somebody',
            'client_secret': 'a-secret',
            'refresh_token': 'another-token',
            'quota_project_id': 'a-project',
            'token': _TOKEN,
            'expiry': '2199-01-01T00:00:00Z',
        }
        path = directory / 'credentials.json'
        path.write_text(json.dumps(credentials))
        return {
            'STORAGE_EMULATOR_HOST': f'http://localhost:{self._port}',
            'GOOGLE_APPLICATION_CREDENTIALS': str(path),
        }

    @property
    def changes(self) -> list[tuple[str, str]]:
        """What was written and deleted, in its order."""
        return list(self.storage.changes)

    def names(self, below: str) -> set[str]:
        """Objects in the bucket below a prefix, without it."""
        found = list(self.storage.objects.get(BUCKET, {}))
        return {name.removeprefix(below) for name in found if name.startswith(below)}

    def content(self, name: str) -> bytes:
        """An object's content."""
        return self.storage.get_file(BUCKET, name)

    def put(self, name: str, content: bytes) -> None:
        """Makes an object past the endpoint."""
        resource = {'bucket': BUCKET, 'name': name, 'size': str(len(content)), 'generation': '1'}
        resource |= {'updated': '2026-01-01T00:00:00Z'}
        self.storage.create_file(BUCKET, name, content, resource)

    def delete(self, name: str) -> None:
        """Deletes an object past the endpoint."""
        self.storage.delete_file(BUCKET, name)

    def start(self) -> None:
        """Listens, after a `stop` at the same port again."""
        handler = functools.partial(_Handler, self)
        self._server = http.server.ThreadingHTTPServer(('localhost', self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Goes away: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> 'Gcs':
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Handler(RequestHandler):
    def __init__(self, gcs: Gcs, *args: Any):
        self._gcs = gcs
        super().__init__(gcs.storage, *args)

    def do_GET(self) -> None:
        self._serve(super().do_GET)

    def do_POST(self) -> None:
        self._serve(super().do_POST)

    def do_PUT(self) -> None:
        self._serve(super().do_PUT)

    def _serve(self, answer: Callable[[], None]) -> None:
        if self.headers.get('authorization') != f'Bearer {_TOKEN}':
            self._refuse(401)
        elif status := self._gcs.refuse(self.command, urllib.parse.unquote(self.path)):
            self._refuse(status)
        else:
            with self._gcs.lock:
                answer()

    def _refuse(self, status: int) -> None:
        self.rfile.read(int(self.headers.get('content-length') or 0))
        answer = json.dumps({'error': {'code': status, 'message': 'refused by the test'}}).encode()
        self.send_response(status)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
