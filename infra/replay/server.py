"""A replay shard: configuration in, one Reverb server out, with the tables of its shard number.

Run as `python -m infra.replay.server --config FILE --shard I --port N --ready_file F`. Tables:
`experience` (uniform or prioritized sampling, oldest out first) and, on shard 0, the queue
`telemetry`.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from infra import process
from infra import telemetry as telemetry_lib
from infra.directories import hold, sync
from infra.flags import add_state_flags
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.errors import ReplayUnavailable
from infra.replay.trajectory import TrajectorySpec

if TYPE_CHECKING:
    import reverb

_DONE_FILE = 'DONE'  # Reverb writes it last
_SIZES_FILE = 'SIZES.json'
_CONFIG_FILE = 'shard.json'  # of a directory with a shard's own state
_NUMBER_DIGITS = 8
_DAMAGED = 'damaged-'  # prefix of a checkpoint that could not be read
_INCOMING = 'incoming-'  # prefix of the directory a running shard writes to
_PORT_ATTEMPTS = 10
_WAKE_SECONDS = 0.5
_STOP_SECONDS = 2.0  # open streams may delay Reverb's orderly stop
_STATE_SECONDS = 600.0  # a shard answers nobody while it writes; a lost replay fills again
_SAVE_SECONDS = 600.0
_LAST_SAVE_SECONDS = 240.0  # supervisors kill after 300 (infra/kubernetes, infra/systemd)


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """What a shard's configuration file holds (JSON, this class as a dict)."""

    replay: ReplayConfig
    trajectory: TrajectorySpec
    batch_size: int = 32  # transitions in an update: with the ratio gives samples per insert
    telemetry: bool = True  # shard 0 holds the telemetry queue
    experience: bool = True  # False: only telemetry (bundled topology on many machines)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ShardConfig':
        """The inverse of `dataclasses.asdict`.

        Raises:
          TypeError: an unknown or missing field.
          ValueError: a value out of its range.
        """
        nested = {
            'replay': ReplayConfig(**values['replay']),
            'trajectory': TrajectorySpec(**values['trajectory']),
        }
        return cls(**{**values, **nested})


def rate_limiter(config: ReplayConfig, batch_size: int) -> 'reverb.rate_limiters.RateLimiter':
    """Sampling starts at the minimum size, then keeps the ratio if there is one."""
    import reverb

    samples_per_insert = config.samples_per_insert(batch_size)
    if not samples_per_insert:
        return reverb.rate_limiters.MinSize(config.shard_min_size)
    return reverb.rate_limiters.SampleToInsertRatio(
        samples_per_insert=samples_per_insert,
        min_size_to_sample=config.shard_min_size,
        error_buffer=config.shard_tolerance(batch_size),
    )


def sampler(config: ReplayConfig) -> Any:
    """Draws transitions uniformly, or in proportion to priority^exponent (Schaul et al. 2016)."""
    import reverb

    if config.prioritized:
        return reverb.selectors.Prioritized(config.priority_exponent)
    return reverb.selectors.Uniform()


def build_tables(config: ShardConfig, shard: int) -> list['reverb.Table']:
    """The tables of shard number `shard`.

    Raises:
      ValueError: no such shard, or a shard that would hold no table.
    """
    import reverb
    import tensorflow as tf

    if not 0 <= shard < config.replay.num_replay_shards:
        raise ValueError(f'shard {shard} of {config.replay.num_replay_shards}: no such shard')
    tables = []
    if config.experience:
        spec = config.trajectory
        rows = tf.TensorSpec((spec.window, spec.row_bytes), tf.uint8, name='rows')
        tables.append(
            reverb.Table(
                name=EXPERIENCE_TABLE,
                sampler=sampler(config.replay),
                remover=reverb.selectors.Fifo(),
                max_size=config.replay.shard_capacity,
                rate_limiter=rate_limiter(config.replay, config.batch_size),
                signature={'rows': rows},
            )
        )
    if config.telemetry and shard == 0:
        tables.append(telemetry_lib.build_table())
    if not tables:
        raise ValueError(f'shard {shard} holds neither experience nor telemetry')
    return tables


def save(addresses: Sequence[str], timeout_seconds: float = 120.0, keep: int = 2) -> list[str]:
    """Asks every shard to write a checkpoint, side by side; returns their paths, in order.

    Reverb deletes a shard's older checkpoint as soon as the next is written. Where the files can be
    reached from here they are therefore moved out of its sight, and the last `keep` are kept, so
    that a run can fall back to the one before. A shard answers no other call while it writes.

    Raises:
      ReplayUnavailable: a shard did not answer within the time, or could not write.
    """
    paths: list[Any] = [None] * len(addresses)
    written = [False] * len(addresses)

    def write(i: int) -> None:
        import reverb

        try:
            paths[i] = reverb.Client(addresses[i]).checkpoint()
            written[i] = True
        except Exception as error:  # whatever Reverb raises, the caller learns which shard it was
            paths[i] = error

    threads = [
        threading.Thread(target=write, args=(i,), daemon=True) for i in range(len(addresses))
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for i, address in enumerate(addresses):
        if not written[i]:
            late = f'no answer within {timeout_seconds:g} s'
            raise ReplayUnavailable(
                f'replay shard {address} wrote no checkpoint: {paths[i] or late}; look at its log'
                ' and at the free disk space'
            )
    return [_publish(path, keep) for path in paths]


def _publish(path: str, keep: int) -> str:
    """Moves a new checkpoint one directory up, beside the ones before; returns its new path.

    There it is numbered, since the clock, which Reverb names it by, may be set back; and the sizes
    of its files are noted, since Reverb takes an empty file for an empty table.
    """
    incoming, name = os.path.split(path)
    if not os.path.isdir(path) or not os.path.basename(incoming).startswith(_INCOMING):
        return path  # on another host, or not written by `main`
    parent = os.path.dirname(incoming)
    before = published_checkpoints(parent)
    number = 1 + max((_number(each) for each in before), default=0)
    published = os.path.join(parent, f'{number:08d}-{name}')
    with open(os.path.join(path, _SIZES_FILE), 'w') as file:
        json.dump(_sizes(path), file)
    sync(path)
    os.rename(path, published)
    sync(published)
    for older in before[keep - 1 :]:
        shutil.rmtree(older, ignore_errors=True)
    return published


def _sizes(path: str) -> dict[str, int]:
    """Bytes of a checkpoint's files, by name."""
    names = (name for name in os.listdir(path) if name != _SIZES_FILE)
    return {name: os.path.getsize(os.path.join(path, name)) for name in names}


def _number(path: str) -> int:
    """Of a published checkpoint; 0: it has none."""
    number, _, _ = os.path.basename(path).partition('-')
    return int(number) if len(number) == _NUMBER_DIGITS and number.isdigit() else 0


def _require_whole(path: str) -> None:
    """Raises RuntimeError when a file of a published checkpoint has lost some of its bytes."""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(path, _SIZES_FILE)) as file:
            if json.load(file) == _sizes(path):
                return
    raise RuntimeError(f'a file is missing or not as long as {_SIZES_FILE} says')


def published_checkpoints(checkpoint_dir: str) -> list[str]:
    """Paths of a shard's complete checkpoints, newest first."""
    if not os.path.isdir(checkpoint_dir):
        return []
    entries = (entry for entry in os.listdir(checkpoint_dir) if not entry.startswith(_DAMAGED))
    paths = (os.path.join(checkpoint_dir, entry) for entry in entries)
    complete = [path for path in paths if os.path.exists(os.path.join(path, _DONE_FILE))]
    return sorted(complete, key=lambda path: (_number(path), path), reverse=True)


def _checkpoint_root(checkpoint_dir: str | None, restore_path: str | None) -> str:
    """A new, empty directory for Reverb's checkpointer.

    Left to itself it would start from the newest checkpoint it finds in its own directory, asked
    or not: hence an empty directory of its own at every start.
    """
    if checkpoint_dir is None:
        return tempfile.mkdtemp(prefix='replay-')
    checkpoint_dir = os.path.abspath(checkpoint_dir)
    os.makedirs(checkpoint_dir, exist_ok=True)
    for entry in os.listdir(checkpoint_dir):  # what a killed predecessor left half-written
        stale = os.path.join(checkpoint_dir, entry)
        if entry.startswith(_INCOMING) and not (restore_path or '').startswith(stale):
            shutil.rmtree(stale, ignore_errors=True)
    return tempfile.mkdtemp(prefix=_INCOMING, dir=checkpoint_dir)


def _require_free_port(port: int) -> int:
    """`port`, or a free one for 0. gRPC itself would share a port in use without a word.

    Raises:
      OSError: the port is busy.
    """
    import portpicker

    if port:
        if not portpicker.is_port_free(port):
            raise OSError(f'port {port} is in use; choose another, or 0 for any free one')
        return port
    for _ in range(_PORT_ATTEMPTS):
        free = portpicker.pick_unused_port()
        if portpicker.is_port_free(free):
            return free
    raise OSError('no free port was found; name one, or end other servers')


def start_server(
    tables: Sequence['reverb.Table'],
    port: int = 0,
    checkpoint_dir: str | None = None,
    restore_path: str | None = None,
) -> 'reverb.Server':
    """Starts a server over `tables`; port 0: any free one. It starts from `restore_path` alone.

    A restored table has the size, the limiter and the counts of the checkpoint. Without
    `checkpoint_dir` no directory is left, unless the server is asked for a checkpoint.

    Raises:
      OSError: the port is busy.
      FileNotFoundError: there is no complete checkpoint at `restore_path`.
      RuntimeError: Reverb could not read the checkpoint.
    """
    import reverb

    if restore_path is not None:
        restore_path = os.path.abspath(restore_path)
        if not os.path.exists(os.path.join(restore_path, _DONE_FILE)):
            raise FileNotFoundError(f'{restore_path} holds no complete replay checkpoint')
    root = _checkpoint_root(checkpoint_dir, restore_path)
    try:
        checkpointer = reverb.checkpointers.DefaultCheckpointer(
            root, fallback_checkpoint_path=restore_path
        )
        # The port last: another process may take it between the look and the start.
        return reverb.Server(tables, _require_free_port(port), checkpointer)
    finally:
        if checkpoint_dir is None:  # Reverb makes it again when it has something to write
            shutil.rmtree(root, ignore_errors=True)


def start_from_newest(
    build: Callable[[], Sequence['reverb.Table']], port: int, state_dir: str
) -> 'reverb.Server':
    """`start_server` from the newest checkpoint in `state_dir` that can be read; else empty.

    `build` makes the tables anew for each attempt, since a server takes them over. A damaged
    checkpoint is told of and set aside.

    Raises:
      OSError: the port is busy, or `state_dir` cannot be written.
    """
    for path in published_checkpoints(state_dir):
        try:
            _require_whole(path)
            return start_server(build(), port, state_dir, path)
        except RuntimeError as error:
            print(f'{path} cannot be read: {error}', file=sys.stderr, flush=True)
            aside = os.path.join(state_dir, f'{_DAMAGED}{os.path.basename(path)}')
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    return start_server(build(), port, state_dir)


def stop_server(server: 'reverb.Server') -> None:
    """Stops a server; waits a bounded time for the streams that are still open."""
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(_STOP_SECONDS)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m infra.replay.server', description=__doc__)
    parser.add_argument('--config', required=True, help='JSON file: ShardConfig as a dict')
    parser.add_argument('--shard', type=int, required=True, help='number of this shard, from 0')
    parser.add_argument('--port', type=int, default=0, help='0: any free port')
    parser.add_argument(
        '--host', help='accepted for uniformity: Reverb listens on every interface of the host'
    )
    parser.add_argument('--ready_file', help='written with {"port", "pid"} once it serves')
    where = 'where checkpoints that a run asks for go'
    add_state_flags(parser, '--checkpoint_dir', where, _STATE_SECONDS)
    parser.add_argument('--restore', help='with --checkpoint_dir: a checkpoint to start from')
    options = parser.parse_args(arguments)
    if options.restore and options.state_dir:
        parser.error('--restore contradicts --state_dir, which says what to start from')
    return options


def _require_same(options: argparse.Namespace, config: ShardConfig) -> None:
    """Checks that the state is of this very shard: a table comes back as it was.

    Raises:
      ValueError: it is another's.
    """
    path = os.path.join(options.state_dir, _CONFIG_FILE)
    now = {'shard': options.shard, **dataclasses.asdict(config)}
    if not os.path.exists(path):
        with open(path, 'w') as file:
            json.dump(now, file)
    with open(path) as file:
        before = json.load(file)
    if before != json.loads(json.dumps(now)):
        raise ValueError(
            f'--state_dir {options.state_dir} holds the state of another shard, or of an experiment'
            ' with other values; empty it, or give another one'
        )


_held: list[BinaryIO] = []  # directories, until this process ends


def _start(options: argparse.Namespace) -> 'reverb.Server':
    """Reads the configuration and starts the server; see `main` for what may be raised."""
    with open(options.config) as file:
        config = ShardConfig.from_dict(json.load(file))
    build = functools.partial(build_tables, config, options.shard)
    if options.state_dir:
        _held.append(hold(options.state_dir))
        _require_same(options, config)
        return start_from_newest(build, options.port, os.path.abspath(options.state_dir))
    return start_server(build(), options.port, options.checkpoint_dir, options.restore)


def _serve(server: 'reverb.Server', options: argparse.Namespace, stopped: threading.Event) -> None:
    """Serves until `stopped`; writes its state, if it has a place for it, now and then and last."""
    period = options.state_period_seconds
    due = time.monotonic() + period
    # Not without bound: another thread may take the signal, and then nothing wakes this one.
    while not stopped.wait(_WAKE_SECONDS):
        if options.state_dir and time.monotonic() >= due:
            _keep_state(server.port, options.state_dir, _SAVE_SECONDS)
            due = time.monotonic() + period
    if options.state_dir:
        _keep_state(server.port, options.state_dir, _LAST_SAVE_SECONDS)


def _keep_state(port: int, state_dir: str, timeout_seconds: float) -> None:
    """Writes a checkpoint; what cannot be written is told, and the one before stays the newest."""
    try:
        save([f'127.0.0.1:{port}'], timeout_seconds)
    except (ReplayUnavailable, OSError) as error:
        print(f'no state written: {error}', file=sys.stderr, flush=True)
        for incoming in glob.glob(os.path.join(glob.escape(state_dir), f'{_INCOMING}*', '*')):
            shutil.rmtree(incoming, ignore_errors=True)  # a part of one, which fills the disk


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM; returns the exit code: 0, or 2 when it could not start."""
    process.exit_with_launcher()
    options = _parse(arguments)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides when a run ends
    try:
        server = _start(options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        if isinstance(error, KeyError):
            error = ValueError(f'{options.config} lacks {error}: it is no configuration of replay')
        print(f'replay shard {options.shard} cannot start: {error}', file=sys.stderr, flush=True)
        return 2
    if options.ready_file:
        process.announce_ready(options.ready_file, server.port)
    print(f'replay shard {options.shard} serves on port {server.port}', flush=True)
    _serve(server, options, stopped)
    stop_server(server)
    return 0


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    code = main(sys.argv[1:])
    # Without the interpreter's own shutdown: a destructor of Reverb may wait for open streams.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
