"""Servers that a run attaches to, checked before anything is written: do they fit, are they new?

In: addresses and an experiment. Out: nothing, or an error that names the address and the remedy. A
server that was started with other values, or that holds what another run has learned, would make
`config.json` and `summary.json` untrue.
"""

import functools
import pathlib
import socket
from collections.abc import Callable, Mapping
from typing import Any

from infra.addresses import split_address
from infra.replay.config import EXPERIENCE_TABLE
from infra.replay.trajectory import TrajectorySpec
from infra.telemetry import TELEMETRY_TABLE
from infra.tls import read_roots
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch

_CONNECT_SECONDS = 5.0
_REASON_CHARACTERS = 300
# What each client may choose for itself.
_CLIENTS_OWN = frozenset({'wire_dtype', 'shared_memory'})
_ANEW = 'start it anew, or another one in its place'


def require_servers(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that a server of its kind, and of this experiment, answers at each address.

    It must be fresh, or, for a run to go on with, have the state of that very run.

    Raises:
      UsageError: nobody listens there, or something else, or a server that does not fit.
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
        if not launch.resume and config.run.topology != 'bundled':
            _require_empty(tables[EXPERIENCE_TABLE].current_size, address)


def _require_listener(address: str) -> None:
    try:
        socket.create_connection(split_address(address), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f'{address}: no server answers ({error}); start it first, or correct the address.'
        ) from error


def _answer(address: str, kind: str, ask: Callable[[str], Any]) -> Any:
    try:
        return ask(address)
    except Exception as error:  # gRPC, Flight and Reverb each raise kinds of their own
        raise UsageError(
            f'{address}: answers, but not as a {kind} ({_reason(error)}); correct the address, and'
            ' give --tls_roots just when parameter shards speak TLS: their issuers.'
        ) from error


def _reason(error: Exception) -> str:
    """An error's kind and first line, in which gRPC also tells what is wrong with a certificate."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:_REASON_CHARACTERS]}'


def _ask_parameter_shard(address: str, tls_roots: bytes | None) -> Mapping[str, Any]:
    from infra.parameter_server import health

    with health.connect(address, tls_roots) as client:
        return health.ask(client, _CONNECT_SECONDS)


def _ask_replay_shard(address: str) -> Mapping[str, Any]:
    import reverb

    return reverb.Client(address).server_info(timeout=int(_CONNECT_SECONDS))


def _check_parameter_shard(
    report: Mapping[str, Any], config: ExperimentConfig, shard: int, address: str
) -> None:
    if report['shard'] != shard:
        raise UsageError(
            f'{address}: is parameter shard {report["shard"]}, but stands at place {shard} of'
            ' --parameter_addresses; give all shards in their order.'
        )
    shards = report['config']['num_parameter_shards']
    if shards != config.parameter_server.num_parameter_shards:
        raise UsageError(
            f'{address}: is one of {shards} parameter shards; name all of them, in order, in'
            ' --parameter_addresses.'
        )
    for name, value in report['config'].items():
        wanted = getattr(config.parameter_server, name)
        if value != wanted and name not in _CLIENTS_OWN:
            raise UsageError(
                f'{address}: was started with --{name} {value}, this run asks for {wanted}; give'
                f' --{name} {value}, or {_ANEW}.'
            )


def _check_owner(
    report: Mapping[str, Any], run: str, resume: bool, shard: int, address: str
) -> None:
    """Checks that a shard has the state of `run`, which goes on, or is free for it to begin."""
    owner = report['owner']
    # A run takes the first shard at once, the others when it first asks for their counts.
    theirs = owner == run or (shard > 0 and not owner)
    if resume and not theirs:
        raise UsageError(
            f'{address}: belongs to {owner or "no run"}, not to {run}; leave the addresses out to'
            ' go on from its checkpoint with servers of its own.'
        )
    if resume and not report['initialised']:
        raise UsageError(
            f'{address}: holds nothing of {run} any more; leave the addresses out to go on from its'
            ' checkpoint with servers of its own.'
        )
    if not resume and run and owner == run and report['version']:
        raise UsageError(
            f'{address}: belongs to this run, {run}, and is at update {report["version"]}; add'
            ' --resume to go on with it.'
        )
    # This very run may have been told to go before it had learned anything.
    fresh = not (report['initialised'] or report['stopping'] or owner)
    if not resume and not fresh and not (run and owner == run and not report['version']):
        raise UsageError(
            f'{address}: belongs to another run, {owner or "which is not known"}, and is at update'
            f' {report["version"]}; {_ANEW}.'
        )


def _check_replay_shard(
    tables: Mapping[str, Any], config: ExperimentConfig, shard: int, address: str
) -> None:
    bundled = config.run.topology == 'bundled'
    if shard == 0 and TELEMETRY_TABLE not in tables:
        raise UsageError(
            f'{address}: stands first in --replay_addresses but has no telemetry queue; name shard'
            ' 0 first.'
        )
    if bundled:
        return  # each bundle has a replay of its own
    if EXPERIENCE_TABLE not in tables:
        raise UsageError(
            f'{address}: holds no table {EXPERIENCE_TABLE!r} (is it the server of a bundled run?);'
            f' {_ANEW}.'
        )
    found, wanted = _described(tables[EXPERIENCE_TABLE]), _expected(config)
    for name, value in wanted.items():
        if found[name] != value:
            raise UsageError(
                f'{address}: was started with {name} {found[name]}, this run asks for {value};'
                f' give the flags it was started with, or {_ANEW}.'
            )


def _require_empty(size: int, address: str) -> None:
    if size:
        raise UsageError(f'{address}: holds {size} transitions of another run; {_ANEW}.')


def _described(table: Any) -> dict[str, Any]:
    """What a replay shard's table says of itself."""
    limiter = table.rate_limiter_info
    return {
        'rows and bytes of an item': list(table.signature['rows'].shape),
        'capacity': table.max_size,
        'minimum size': limiter.min_size_to_sample,
        'samples per insert': limiter.samples_per_insert,
        'priority exponent': table.sampler_options.prioritized.priority_exponent,
    }


def _expected(config: ExperimentConfig) -> dict[str, Any]:
    """What a replay shard's table of this experiment says of itself."""
    spec = TrajectorySpec(frame_stack=config.environment.frame_stack, n_step=config.agent.n_step)
    # A table without a ratio samples any number of times: Reverb calls that 1.
    ratio = config.replay.samples_per_insert(config.learner.batch_size) or 1.0
    return {
        'rows and bytes of an item': [spec.window, spec.row_bytes],
        'capacity': config.replay.shard_capacity,
        'minimum size': config.replay.shard_min_size,
        'samples per insert': ratio,
        'priority exponent': config.replay.priority_exponent,
    }
