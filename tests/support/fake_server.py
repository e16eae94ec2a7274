"""Stands in for a server's command: takes the same flags, listens, and fails when told to.

Environment: GORILA_FAKE_FAILS, GORILA_FAKE_HANGS and GORILA_FAKE_ENDS hold names of servers, such
as `replay_0`, that end with exit code 1, never become ready, or end once they are.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from infra.process import announce_ready, exit_with_parent


def main() -> None:
    """Serves until SIGTERM."""
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ('--config', '--ready_file', '--host'):
        parser.add_argument(flag, required=True)
    parser.add_argument('--shard', type=int, required=True)
    parser.add_argument('--port', type=int, required=True)
    parser.add_argument('--checkpoint_dir')
    parser.add_argument('--checkpoint_root')
    parser.add_argument('--restore')
    options = parser.parse_args()
    name = Path(options.ready_file).stem
    json.loads(Path(options.config).read_text())
    print('arguments', json.dumps(vars(options)), flush=True)
    if name in os.environ.get('GORILA_FAKE_FAILS', '').split():
        sys.exit(f'{name}: told to fail')
    if name in os.environ.get('GORILA_FAKE_HANGS', '').split():
        signal.pause()
    with socket.create_server((options.host, options.port), reuse_port=False) as listener:
        announce_ready(options.ready_file, listener.getsockname()[1])
        if name in os.environ.get('GORILA_FAKE_ENDS', '').split():
            time.sleep(0.5)  # until it has been seen to serve
            raise RuntimeError('told to end')
        while True:
            listener.accept()[0].close()


if __name__ == '__main__':
    main()
