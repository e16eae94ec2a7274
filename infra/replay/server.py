"""A replay shard: configuration in, one Reverb server with the tables of its shard number out.

Run as `python -m infra.replay.server --config FILE --shard I --port N --ready_file F`. The table
`experience` samples uniformly or by priority and evicts the oldest transition. Shard 0 also has the
queue `telemetry`.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from infra import disk, process
from infra import telemetry as telemetry_lib
from infra.addresses import reach_directly
from infra.disk import digests, hold, remove_leftovers, write_atomically
from infra.flags import Parser, add_shard_flags, nonempty_path
from infra.output import protect_output
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.errors import ReplayUnavailable
from infra.replay.trajectory import TrajectorySpec
from infra.sealed import parse_object, seal, unseal

if TYPE_CHECKING:
    import reverb

_DONE_FILE = 'DONE'  # Reverb writes it last
_SIZES_FILE = 'SIZES.json'
_FILES = 'files'  # in it: [bytes, CRC-32] by name
_CONFIG_FILE = 'shard.json'  # of a directory with a shard's own state
_NUMBER_DIGITS = 8
_INCOMING = 'incoming-'  # prefix of the directory a running shard writes to
_PORT_ATTEMPTS = 10
_WAKE_SECONDS = 0.5
_STOP_SECONDS = 2.0  # open streams may delay Reverb's orderly stop
_STATE_SECONDS = 600.0  # seldom, since a shard blocks while it writes and a lost replay refills
SAVE_SECONDS = 600.0
_LAST_SAVE_SECONDS = 240.0  # supervisors kill after 300 (infra/kubernetes, infra/systemd)


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """Contents of a shard's configuration file (JSON, this class as a dict)."""

    replay: ReplayConfig
    trajectory: TrajectorySpec
    batch_size: int = 32  # transitions per update; sets samples per insert together with the ratio
    telemetry: bool = True  # whether shard 0 holds the telemetry queue
    experience: bool = True  # if false, telemetry only (bundled topology)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ShardConfig':
        """The inverse of `dataclasses.asdict`.

        Raises:
          TypeError: a field is unknown.
          KeyError: `replay` or `trajectory` is missing.
          ValueError: a value is out of its range.
        """
        nested = {
            'replay': ReplayConfig(**values['replay']),
            'trajectory': TrajectorySpec.from_dict(values['trajectory']),
        }
        return cls(**{**values, **nested})


def rate_limiter(config: ReplayConfig, batch_size: int) -> 'reverb.rate_limiters.RateLimiter':
    """Builds a limiter that starts sampling at the minimum size, then keeps the ratio if any."""
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
    """Builds a uniform sampler, or one by priority^exponent (Schaul et al. 2016)."""
    import reverb

    if config.prioritized:
        return reverb.selectors.Prioritized(config.priority_exponent)
    return reverb.selectors.Uniform()


def build_tables(config: ShardConfig, shard: int) -> list['reverb.Table']:
    """Builds the tables of shard number `shard`.

    Raises:
      ValueError: the shard does not exist or would hold no table.
    """
    import reverb
    import tensorflow as tf

    if not 0 <= shard < config.replay.num_replay_shards:
        raise ValueError(f'shard {shard} of {config.replay.num_replay_shards}: no such shard')
    tables = []
    if config.experience:
        spec = config.trajectory
        rows = tf.TensorSpec((spec.window, spec.row_bytes), tf.uint8, name=spec.rows_name)
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
    """Makes all shards write checkpoints in parallel and returns their paths, in order.

    Reverb deletes a shard's previous checkpoint once it has written the next. This function
    therefore moves a checkpoint on this host out of Reverb's directory and keeps the last `keep`,
    so that a run can fall back to an older one. A shard replies to no other call while it writes.

    Raises:
      ReplayUnavailable: a shard does not reply within the time, or fails to write.
    """
    paths: list[Any] = [None] * len(addresses)
    written = [False] * len(addresses)

    def write(i: int) -> None:
        import reverb

        try:
            paths[i] = reverb.Client(addresses[i]).checkpoint()
            written[i] = True
        except Exception as error:  # Reverb raises many types; reported with the shard's address
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
                f'replay shard {address} wrote no checkpoint: {paths[i] or late}. Fix: look at'
                ' its log and at the free disk space.'
            )
    return [_publish(path, keep) for path in paths]


def _publish(path: str, keep: int) -> str:
    """Moves a new checkpoint up one directory, beside older ones, and returns its new path.

    Numbers it, since Reverb names it by the clock, which may be set back. Lists its files with
    checksums, since Reverb takes an empty file for an empty table, and some flipped bits for data.
    """
    incoming, name = os.path.split(path)
    if not os.path.isdir(path) or not os.path.basename(incoming).startswith(_INCOMING):
        return path  # on another host, or not written by `main`
    parent = os.path.dirname(incoming)
    before = published_checkpoints(parent)
    number = 1 + max((_number(each) for each in before), default=0)
    published = os.path.join(parent, f'{number:08d}-{name}')
    shutil.copymode(incoming, path)  # Reverb's is 0755, whatever the umask
    note = pathlib.Path(path, _SIZES_FILE)
    write_atomically(note, json.dumps(seal({_FILES: digests(path)})))
    disk.publish(pathlib.Path(path), pathlib.Path(published))
    disk.remove(pathlib.Path(older) for older in before[keep - 1 :])
    return published


def _number(path: str) -> int:
    """The number of a published checkpoint, 0 if its name has no number."""
    number, _, _ = os.path.basename(path).partition('-')
    return int(number) if len(number) == _NUMBER_DIGITS and number.isdecimal() else 0


def require_whole(path: str) -> None:
    """Raises RuntimeError if a file of a published checkpoint is missing or changed."""
    with contextlib.suppress(OSError, ValueError):
        noted = unseal(parse_object(pathlib.Path(path, _SIZES_FILE).read_bytes()))
        found = digests(path)
        del found[_SIZES_FILE]
        # An earlier version listed lengths only.
        lengths = {name: length for name, (length, _) in found.items()}
        if noted in ({_FILES: found}, lengths):
            return
    raise RuntimeError(f'a file is missing or not what {_SIZES_FILE} says')


def published_checkpoints(checkpoint_dir: str) -> list[str]:
    """Paths of a shard's complete checkpoints, newest first."""
    if not os.path.isdir(checkpoint_dir):
        return []
    entries = (
        entry for entry in os.listdir(checkpoint_dir) if not entry.startswith((disk.DAMAGED, '.'))
    )
    paths = (os.path.join(checkpoint_dir, entry) for entry in entries)
    complete = [path for path in paths if os.path.exists(os.path.join(path, _DONE_FILE))]
    return sorted(complete, key=lambda path: (_number(path), path), reverse=True)


def _checkpoint_root(checkpoint_dir: str | None, restore_path: str | None) -> str:
    """Creates an empty directory for Reverb's checkpointer.

    The checkpointer always restores the newest checkpoint in its directory, so it gets an empty one
    at every start.
    """
    if checkpoint_dir is None:
        return tempfile.mkdtemp(prefix='replay-')
    checkpoint_dir = os.path.abspath(checkpoint_dir)
    os.makedirs(checkpoint_dir, exist_ok=True)
    for entry in os.listdir(checkpoint_dir):  # incomplete directories of a killed predecessor
        stale = os.path.join(checkpoint_dir, entry)
        if entry.startswith(_INCOMING) and not (restore_path or '').startswith(stale):
            shutil.rmtree(stale, ignore_errors=True)
    root = os.path.join(checkpoint_dir, f'{_INCOMING}{uuid.uuid4().hex}')
    os.mkdir(root)
    return root


def _require_free_port(port: int) -> int:
    """Returns `port`, or a free one for 0. gRPC itself would silently share a port in use.

    Raises:
      OSError: the port is in use.
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
    """Starts a server for `tables` from the checkpoint at `restore_path`, or empty.

    Port 0 takes any free one. A restored table has the size, limiter and counts of the checkpoint.
    Without `checkpoint_dir` the server leaves no directory, unless it writes a checkpoint.

    Raises:
      OSError: the port is in use.
      FileNotFoundError: `restore_path` has no complete checkpoint.
      RuntimeError: Reverb fails to read the checkpoint.
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
        # Chooses the port last, because another process may take it before the start.
        return reverb.Server(tables, _require_free_port(port), checkpointer)
    finally:
        if checkpoint_dir is None:  # Reverb creates it again to write a checkpoint
            shutil.rmtree(root, ignore_errors=True)


def start_from_newest(
    build: Callable[[], Sequence['reverb.Table']], port: int, state_dir: str
) -> 'reverb.Server':
    """Starts a server from the newest readable checkpoint in `state_dir`, or empty.

    `build` creates new tables for each attempt, because a server takes ownership of them. A damaged
    checkpoint is reported and renamed.

    Raises:
      OSError: the port is in use, or `state_dir` is not writable.
    """
    for path in published_checkpoints(state_dir):
        try:
            require_whole(path)
            return start_server(build(), port, state_dir, path)
        except RuntimeError as error:
            print(f'{path} cannot be read: {error}', file=sys.stderr, flush=True)
            disk.set_aside(pathlib.Path(path))
    return start_server(build(), port, state_dir)


def stop_server(server: 'reverb.Server') -> None:
    """Stops a server; waits a bounded time for open streams."""
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(_STOP_SECONDS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog='python -m infra.replay.server', description=__doc__)
    where = 'Directory for checkpoints that a run requests.'
    add_shard_flags(parser, '--checkpoint_dir', where, _STATE_SECONDS)
    parser.add_argument('--host', help='No effect: Reverb listens on every interface.')
    parser.add_argument(
        '--restore',
        type=nonempty_path,
        help='Checkpoint to start from, with --checkpoint_dir.',
    )
    options = parser.parse_args(arguments)
    if options.restore and options.state_dir:
        parser.error(
            '--restore contradicts --state_dir, which starts from its newest state. Fix: omit one.'
        )
    return options


def require_same(options: argparse.Namespace, config: ShardConfig) -> None:
    """Checks that the state belongs to this shard, because a restored table keeps its settings.

    Raises:
      ValueError: the state belongs to another shard or other settings, or its file is damaged.
    """
    path = pathlib.Path(options.state_dir, _CONFIG_FILE)
    now = json.dumps({'shard': options.shard, **dataclasses.asdict(config)})
    if not path.exists():
        write_atomically(path, json.dumps(seal(json.loads(now))))
    try:
        before = _shard_of(unseal(parse_object(path.read_bytes())))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is damaged: {error}. Fix: remove it, if the state is of this very shard'
        ) from error
    if before != _shard_of(json.loads(now)):
        raise ValueError(
            f'--state_dir {options.state_dir} holds the state of another shard, or of an experiment'
            ' with other values; empty it, or give another one'
        )


def _shard_of(values: dict[str, Any]) -> tuple[int, ShardConfig]:
    """Number and configuration of a shard, by its file."""
    number = values.pop('shard')
    return number, ShardConfig.from_dict(values)


_held: list[BinaryIO] = []  # locks of directories, until this process ends


def _start(options: argparse.Namespace) -> 'reverb.Server':
    """Reads the configuration and starts the server; `main` handles its errors."""
    config = ShardConfig.from_dict(parse_object(pathlib.Path(options.config).read_bytes()))
    build = functools.partial(build_tables, config, options.shard)
    if options.state_dir:
        _held.append(hold(options.state_dir))
        remove_leftovers(pathlib.Path(options.state_dir))
        require_same(options, config)
        return start_from_newest(build, options.port, os.path.abspath(options.state_dir))
    return start_server(build(), options.port, options.checkpoint_dir, options.restore)


def _serve(server: 'reverb.Server', options: argparse.Namespace, stopped: threading.Event) -> None:
    """Waits until `stopped`; writes the state once per period and at the end, if it has a place."""
    period = options.state_period_seconds
    due = time.monotonic() + period
    # Polls, because another thread may take the signal and an unbounded wait would not return.
    while not stopped.wait(_WAKE_SECONDS):
        if options.state_dir and time.monotonic() >= due:
            keep_state(server.port, options.state_dir, SAVE_SECONDS)
            due = time.monotonic() + period
    if options.state_dir:
        keep_state(server.port, options.state_dir, _LAST_SAVE_SECONDS)


def keep_state(port: int, state_dir: str, timeout_seconds: float) -> None:
    """Writes a checkpoint; prints a failure, after which the previous one remains the newest."""
    try:
        save([f'127.0.0.1:{port}'], timeout_seconds)
    except (ReplayUnavailable, OSError) as error:
        print(f'no state written: {error}', file=sys.stderr, flush=True)
        for incoming in glob.glob(os.path.join(glob.escape(state_dir), f'{_INCOMING}*', '*')):
            shutil.rmtree(incoming, ignore_errors=True)  # an incomplete one would fill the disk


def main(arguments: Sequence[str]) -> int:
    """Runs a shard until SIGTERM or SIGHUP; returns 0, or 2 if it fails to start."""
    process.exit_with_launcher()
    reach_directly(())  # the shard calls itself over loopback to write its state
    options = parse(arguments)
    stopped = threading.Event()
    for number in process.end_signals():
        signal.signal(number, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
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
    protect_output()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    code = main(sys.argv[1:])
    # Skips the interpreter's shutdown, because a destructor of Reverb may wait for open streams.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
