"""An endpoint in place of the Dataflow service: keeps what it is sent, runs nothing."""

import http.server
import json
import re
import threading
from typing import Any

_JOB = re.compile(
    r'/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs(/(?P<id>[^/?]+))?'
)


class FakeDataflow:
    """A context manager.

    Attributes:
      jobs: every job submitted, as the service was sent it, with its `id`.
      requested: (job's id, state) of each change asked for.
      state: what the service says of each job that nobody asked to end.
      drains: whether a job that is to drain does so at once, or never.
    """

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.requested: list[tuple[str, str]] = []
        self.state = 'JOB_STATE_RUNNING'
        self.drains = True
        self._server = http.server.ThreadingHTTPServer(('localhost', 0), self._handler())

    @property
    def flags(self) -> list[str]:
        """Flags that lead Beam here."""
        endpoint = f'http://localhost:{self._server.server_address[1]}'
        return [f'--dataflow_endpoint={endpoint}', '--no_auth']

    def __enter__(self) -> 'FakeDataflow':
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, method: str, path: str, body: Any) -> dict[str, Any]:
        match = _JOB.match(path)
        assert match, path
        if method == 'POST':
            self.jobs.append({**body, 'id': f'job-{len(self.jobs)}', 'path': path})
            return self._status(self.jobs[-1]['id'])
        if method == 'PUT':
            self.requested.append((match['id'], body['requestedState']))
            return self._status(match['id'])
        if path.partition('?')[0].endswith(match['id']):
            return self._status(match['id'])
        return {}  # messages, metrics

    def _status(self, job: str) -> dict[str, Any]:
        ended = dict(self.requested).get(job)
        if ended == 'JOB_STATE_DRAINING' and self.drains:
            ended = 'JOB_STATE_DRAINED'
        return {'id': job, 'projectId': 'p', 'location': 'r', 'currentState': ended or self.state}

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get('content-length') or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                answer = json.dumps(fake._answer(self.command, self.path, body)).encode()
                self.send_response(200)
                self.send_header('content-type', 'application/json')
                self.send_header('content-length', str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler
