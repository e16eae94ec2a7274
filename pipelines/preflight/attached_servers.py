"""Checks that attached servers fit the experiment and are new or hold the state of this run.

Otherwise `config.json` and `summary.json` would not describe what the run computes.
"""

import dataclasses
import functools
import pathlib
import socket
from collections.abc import Callable, Mapping
from typing import Any

from infra.addresses import split_address
from infra.flags import as_flag
from infra.parameter_server.protocol import PROTOCOL_VERSION
from infra.replay.config import EXPERIENCE_TABLE
from infra.telemetry import TELEMETRY_TABLE
from infra.tls import client_context, read_roots
from pipelines.errors import UsageError
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.frames import trajectory_spec
from pipelines.experiment.launch import Launch

_CONNECT_SECONDS = 10.0
_REASON_CHARACTERS = 300
_CLIENT_SETTINGS = frozenset({'wire', 'shared_memory'})  # may differ from the server's
_RESTART = 'restart it, or attach to another one'
_OMIT_ADDRESSES = (
    'to resume from the checkpoint with new servers, omit --parameter_addresses and'
    ' --replay_addresses'
)


def require_servers(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that a shard of this experiment answers at each address.

    A new run needs new servers; a resumed run needs servers with its state.

    Raises:
      UsageError: a server is unreachable, of another kind, or does not fit.
    """
    run = str(pathlib.Path(launch.run_dir).absolute()) if launch.run_dir else ''
    for address in launch.parameter_addresses + launch.replay_addresses:
        _require_listener(address)
    roots = read_roots(launch.tls_roots) if launch.tls_roots else None
    ask = functools.partial(_ask_parameter_shard, tls_roots=roots)
    for shard, address in enumerate(launch.parameter_addresses):
        report = _answer(address, 'parameter shard', ask)
        _check_parameter_shard(report, config, shard, address)
        _check_owner(report, run, launch.resume, shard, address)
    for shard, address in enumerate(launch.replay_addresses):
        tables = _answer(address, 'replay shard', _ask_replay_shard)
        _check_replay_shard(tables, config, shard, address)
        if not launch.resume and not config.run.replay_in_workers:
            _require_empty(tables[EXPERIENCE_TABLE].current_size, address)


def _require_listener(address: str) -> None:
    try:
        socket.create_connection(split_address(address), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f'{address}: unreachable ({error}). Fix: start the server, or correct the address.'
        ) from error


def _answer(address: str, kind: str, ask: Callable[[str], Any]) -> Any:
    try:
        return ask(address)
    except Exception as error:  # sockets, TLS and Reverb have no common class
        raise UsageError(
            f'{address}: answers, but not as a {kind} ({_reason(error)}). Fix: correct the address;'
            ' set --tls_roots if parameter shards use TLS, and omit it if not.'
        ) from error


def _reason(error: Exception) -> str:
    """Type and first line of an error, which includes TLS's reason to reject a certificate."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:_REASON_CHARACTERS]}'


def _ask_parameter_shard(address: str, tls_roots: bytes | None) -> Mapping[str, Any]:
    from infra.parameter_server import health

    tls = client_context(tls_roots) if tls_roots else None
    return health.ask(address, _CONNECT_SECONDS, tls)


def _ask_replay_shard(address: str) -> Mapping[str, Any]:
    import reverb

    return reverb.Client(address).server_info(timeout=int(_CONNECT_SECONDS))


def _check_parameter_shard(
    report: Mapping[str, Any], config: ExperimentConfig, shard: int, address: str
) -> None:
    if report.get('protocol') != PROTOCOL_VERSION:
        raise UsageError(
            f'{address}: is a parameter shard of another version (protocol'
            f' {report.get("protocol", "unknown")}, here {PROTOCOL_VERSION}). Fix: start it again'
            ' with this version.'
        )
    if report['shard'] != shard:
        raise UsageError(
            f'{address}: is parameter shard {report["shard"]}, but --parameter_addresses lists it'
            f' as shard {shard}. Fix: list all shards in order.'
        )
    shards = report['config']['num_parameter_shards']
    if shards != config.parameter_server.num_parameter_shards:
        raise UsageError(
            f'{address}: is one of {shards} parameter shards. Fix: list all of them, in order, in'
            ' --parameter_addresses.'
        )
    # An end of the step size has an effect only where it falls.
    falls = config.parameter_server.learning_rate_updates > 0
    ignored = _CLIENT_SETTINGS if falls else _CLIENT_SETTINGS | {'learning_rate_end'}
    started = config_lib.completed('parameter_server', report['config'])
    for name, wanted in dataclasses.asdict(config.parameter_server).items():
        value = started.get(name)
        if value != wanted and name not in ignored:
            raise UsageError(
                f'{address}: started with {as_flag(name, value)}, but this run uses'
                f' {as_flag(name, wanted)}. Fix: add {as_flag(name, value)}, or {_RESTART}.'
            )


def _check_owner(
    report: Mapping[str, Any], run: str, resume: bool, shard: int, address: str
) -> None:
    """Checks that a shard holds the state of the resumed `run`, or is free for a new one."""
    owner = report['owner']
    # A run claims shard 0 immediately, the others when it first requests their counts.
    owned = owner == run or (shard > 0 and not owner)
    if resume and not owned:
        raise UsageError(
            f'{address}: belongs to {owner or "no run"}, not to {run}. Fix: {_OMIT_ADDRESSES}.'
        )
    if resume and not report['initialised']:
        raise UsageError(f'{address}: holds no state of {run}. Fix: {_OMIT_ADDRESSES}.')
    if not resume and run and owner == run and report['version']:
        raise UsageError(
            f'{address}: belongs to this run, {run} (update {report["version"]}). Fix: add --resume'
            ' to continue it.'
        )
    # A run that was stopped before its first update may start again.
    fresh = not (report['initialised'] or report['stopping'] or owner)
    if not resume and not fresh and not (run and owner == run and not report['version']):
        raise UsageError(
            f'{address}: belongs to another run, {owner or "unknown"} (update'
            f' {report["version"]}). Fix: {_RESTART}.'
        )


def _check_replay_shard(
    tables: Mapping[str, Any], config: ExperimentConfig, shard: int, address: str
) -> None:
    if shard == 0 and TELEMETRY_TABLE not in tables:
        raise UsageError(
            f'{address}: is first in --replay_addresses, but has no telemetry queue. Fix: list'
            ' shard 0 first.'
        )
    if config.run.replay_in_workers:
        return
    if EXPERIENCE_TABLE not in tables:
        raise UsageError(
            f'{address}: has no table {EXPERIENCE_TABLE!r} (is it the server of a bundled run?).'
            f' Fix: {_RESTART}.'
        )
    found, wanted = _found(tables[EXPERIENCE_TABLE]), _expected(config)
    for name, value in wanted.items():
        if found[name] != value:
            raise UsageError(
                f'{address}: started with {name} {found[name]}, but this run uses {value}. Fix: use'
                f' the flags that it was started with, or {_RESTART}.'
            )


def _require_empty(size: int, address: str) -> None:
    if size:
        raise UsageError(f'{address}: holds {size} transitions of another run. Fix: {_RESTART}.')


def _found(table: Any) -> dict[str, Any]:
    """Properties of a replay shard's table."""
    limiter, rows = table.rate_limiter_info, table.signature['rows']
    return {
        'rows and bytes of an item': list(rows.shape),
        'frames': rows.name,
        'capacity': table.max_size,
        'minimum size': limiter.min_size_to_sample,
        'samples per insert': limiter.samples_per_insert,
        'priority exponent': table.sampler_options.prioritized.priority_exponent,
    }


def _expected(config: ExperimentConfig) -> dict[str, Any]:
    """Properties that the table must have for this experiment."""
    spec = trajectory_spec(config)
    # Reverb reports 1 for a table without a ratio.
    replay = config.served_replay
    ratio = replay.samples_per_insert(config.learner.batch_size) or 1.0
    return {
        'rows and bytes of an item': [spec.window, spec.row_bytes],
        'frames': spec.rows_name,
        'capacity': replay.shard_capacity,
        'minimum size': replay.shard_min_size,
        'samples per insert': ratio,
        'priority exponent': replay.priority_exponent,
    }
