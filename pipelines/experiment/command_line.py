"""Command-line flags in, one frozen experiment out: `run.py` reads the options here, once.

Each field of the configuration dataclasses is a flag of the same name; Beam's own flags are
accepted beside them; any other flag is an error.
"""

import argparse
import dataclasses
import difflib
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from agents.games import GameError, not_taken_over, rom_id
from infra.addresses import AddressError, is_port, split_address
from infra.disk import is_remote
from infra.flags import integer, value_of
from infra.tls import TlsError, read_pair, read_roots
from pipelines.engines import catalog
from pipelines.errors import UsageError
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.experiment.launch import LOOPBACK, Launch
from pipelines.experiment.unused_flags import require_effect

_EPILOG = """examples:
  python pipelines/run.py --runner=DirectRunner
  python pipelines/run.py --game breakout --preset nature --run_dir runs/breakout
  python pipelines/run.py --topology bundled --num_actors 2 --num_learners 2
  python pipelines/run.py --run_dir runs/breakout --resume

Frames are emulator frames (4 an agent step); updates are gradients applied at the parameter server.
A flag without a value of yours takes the preset's; in brackets: those of the preset `{preset}`.
Beam's own flags are accepted too: see `--help_beam`.
"""

_TLS_HELP = {
    'tls_certificate': 'PEM file: with it the parameter shards that are started speak TLS; for the'
    ' name or address in --host',
    'tls_key': "PEM file, the certificate's key; it stays on this machine",
    'tls_roots': 'PEM file: what the certificates of the parameter shards are signed by'
    ' [--tls_certificate itself]; travels to the workers',
}
_KINDS = ('actor', 'learner')
_EXTRA: Mapping[type, Mapping[str, Any]] = {
    bool: {'action': argparse.BooleanOptionalAction},
    int: {'type': integer},
    float: {'type': float},
    str: {},
}
"""How a field's flag is read, by the field's type."""

# Values that a resumed run may change: they decide how long and with whom it goes on, not what
# was learned so far.
RESUMABLE = frozenset(
    {
        'max_frames',
        'num_actors',
        'num_learners',
        'num_parameter_shards',
        'worker_threads',
        'learner_device',
        'checkpoint_period_seconds',
        'checkpoint_replay',
        'evaluation_episodes',
        'evaluation_epsilon',
        'evaluation_max_frames',
        'max_staleness',
        'learning_rate',
        'wire_dtype',
        'shared_memory',
    }
)


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    launch = parser.add_argument_group('launch')
    launch.add_argument(
        '--preset',
        help=f'set of values to start from: {", ".join(presets.PRESETS)} [{presets.DEFAULT}]',
    )
    launch.add_argument(
        '--run_dir',
        help="directory of the run's outputs (runs/<game>-...), or gs://bucket/path, or another"
        ' place that Beam knows: the run works in a local copy and keeps the place up to date',
    )
    launch.add_argument(
        '--work_dir',
        help='local copy of a remote --run_dir (runs/<last part of it>, with a number behind it'
        ' when that is something else)',
    )
    launch.add_argument(
        '--resume', action='store_true', help='go on from the last checkpoint in --run_dir'
    )
    for kind in _KINDS:
        launch.add_argument(
            f'--{kind}_flags',
            default='',
            help=f"Beam's flags for the {kind}s' job only, such as"
            f" --{kind}_flags='--worker_machine_type=n2-standard-4'",
        )


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_argument_group('servers')
    servers.add_argument(
        '--parameter_addresses',
        help='host:port,... of running parameter shards to attach to, in their order',
    )
    servers.add_argument(
        '--replay_addresses', help='host:port,... of running replay shards, in their order'
    )
    for kind in ('parameter', 'replay'):
        servers.add_argument(
            f'--{kind}_ports', help=f'ports of the {kind} shards to start (default: free ones)'
        )
    for name, text in _TLS_HELP.items():
        servers.add_argument(f'--{name}', help=text)
    servers.add_argument(
        '--host',
        default=LOOPBACK,
        help='address of this machine at which workers on others reach the servers to start'
        f' [{LOOPBACK}: workers are on this machine]',
    )


class GorilaOptions(PipelineOptions):
    """The project's flags, one for each field of the configuration."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        _add_arguments(parser, presets.DEFAULT)


def _add_arguments(parser: argparse.ArgumentParser, preset: str) -> None:
    """Adds every flag of ours; its help says the preset's value."""
    _add_launch_arguments(parser)
    _add_server_arguments(parser)
    default = presets.experiment(preset, {})
    for group, config in config_lib.groups():
        arguments = parser.add_argument_group(group.replace('_', ' '))
        kinds = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            value = getattr(getattr(default, group), field.name)
            text = f'{field.metadata["help"]} [{value}]'.replace('%', '%%')
            extra = _EXTRA[kinds[field.name]]
            arguments.add_argument(f'--{field.name}', default=None, help=text, **extra)


def _parser(own_only: bool, preset: str = presets.DEFAULT) -> argparse.ArgumentParser:
    """A strict parser of our flags, and of Beam's unless `own_only`."""
    parser = argparse.ArgumentParser(
        prog='run.py',
        description='Train an Atari agent with parallel actors, parallel learners, a sharded'
        ' replay and a sharded parameter server.',
        epilog=_EPILOG.format(preset=preset),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        conflict_handler='resolve',
    )
    if not own_only:
        for options in PipelineOptions.__subclasses__():
            if options is not GorilaOptions:
                options._add_argparse_args(_BeamArguments(parser))
    else:
        parser.add_argument(
            '--runner',
            default='DirectRunner',
            help=f'engine: {", ".join(catalog.ENGINES)} [DirectRunner]',
        )
        parser.add_argument('--help_beam', action='store_true', help="Beam's own flags")
    _add_arguments(parser, preset)
    return parser


class _BeamArguments:
    """Beam's option classes add their arguments to its own parser class; this adapts ours."""

    def __init__(self, parser: argparse.ArgumentParser):
        self._parser = parser

    def add_value_provider_argument(self, *args: Any, **kwargs: Any) -> None:
        self._parser.add_argument(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def _refuse_unknown(
    unknown: Sequence[str], parser: argparse.ArgumentParser, engine: catalog.Engine
) -> None:
    """Raises UsageError naming a flag of `unknown` and the flags that look like it.

    A job server may know flags that Beam does not: those that look like none of ours go on to it.
    """
    for text in unknown:
        flag = text.split('=')[0]
        known = list(parser._option_string_actions)
        if engine.forwards and not difflib.get_close_matches(flag, known, cutoff=0.8):
            continue
        near = difflib.get_close_matches(flag, known, n=3)
        hint = f' Did you mean {", ".join(near)}?' if near else ' See --help.'
        raise UsageError(f'{text}: unknown flag.{hint}')


def _addresses(kind: str, text: str | None) -> tuple[str, ...]:
    """The host:port pairs of a comma-separated flag."""
    addresses = tuple(part.strip() for part in (text or '').split(',') if part.strip())
    for address in addresses:
        try:
            split_address(address)
        except AddressError as error:
            raise UsageError(f'--{kind}_addresses: {error}.') from error
    return addresses


def _split(kind: str, text: str) -> tuple[str, ...]:
    """Beam's flags in the value of one of ours."""
    try:
        flags = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f'--{kind}_flags {text!r}: {error}; close the quotes.') from error
    beams = _parser(own_only=True).parse_known_args(flags)[1]
    for flag in flags:
        if flag not in beams:
            raise UsageError(f"--{kind}_flags: {flag} is none of Beam's; give it by itself.")
    return flags


def _ports(kind: str, text: str | None) -> tuple[int, ...]:
    """The ports of a comma-separated flag."""
    parts = [part.strip() for part in (text or '').split(',') if part.strip()]
    for part in parts:
        if not is_port(part):
            raise UsageError(f'--{kind}_ports {text}: {part!r} is no port; write 1 to 65535.')
    return tuple(int(part) for part in parts)


def _game(text: str) -> str:
    """The ROM that `text` names; says what an id of gymnasium means beside it.

    Raises:
      UsageError: there is no such game, or it cannot be played.
    """
    try:
        game = rom_id(text)
    except GameError as error:
        raise UsageError(f'--game: {error}') from error
    if note := not_taken_over(text):
        print(f'--game {note}', file=sys.stderr, flush=True)
    return game


def _tls(known: argparse.Namespace) -> tuple[str, str] | None:
    """Files of certificate and key.

    Raises:
      UsageError: one is missing, unreadable or not what it should be.
    """
    if bool(known.tls_certificate) != bool(known.tls_key):
        raise UsageError('--tls_certificate and --tls_key go together; give both, or none.')
    try:
        if known.tls_roots:
            read_roots(known.tls_roots)
        if known.tls_certificate:
            read_pair(known.tls_certificate, known.tls_key)
            return known.tls_certificate, known.tls_key
    except TlsError as error:
        raise UsageError(f'{error}.') from error
    return None


def _flags_of_jobs(known: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, ...]]:
    """Beam's flags of single jobs, checked together with `rest`, those of all; by `_KINDS`.

    Raises:
      UsageError, argparse.ArgumentError: one is unknown, or not the user's to give.
      SystemExit: help was asked for, and printed.
    """
    engine = catalog.engine(known.runner)
    engine.register_flags()
    every = _parser(False, known.preset or presets.DEFAULT)
    if known.help_beam:
        every.print_help()
        raise SystemExit(0)
    of_jobs = [_split(kind, getattr(known, f'{kind}_flags')) for kind in _KINDS]
    for flags in (rest, *of_jobs):
        _refuse_unknown(every.parse_known_args(flags)[1], every, engine)
        catalog.require_free(known.runner, flags)
    return of_jobs


def parse(argv: Sequence[str]) -> tuple[Launch, str | None, dict[str, Any]]:
    """Reads the command line: how to launch, the preset named (or None), values overridden.

    Raises:
      UsageError: a flag is unknown, misses its value, has one of the wrong type or one that is
        not supported.
      SystemExit: `--help` was asked for.
    """
    try:
        preset = value_of('--preset', argv) or presets.DEFAULT
        known, rest = _parser(own_only=True, preset=preset).parse_known_args(argv)
        of_jobs = _flags_of_jobs(known, rest)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    values = {
        name: getattr(known, name)
        for name in config_lib.fields()
        if getattr(known, name) is not None
    }
    if 'game' in values:
        values['game'] = _game(values['game'])
    launch = Launch(
        runner=known.runner,
        run_dir=known.run_dir,
        resume=known.resume,
        parameter_addresses=_addresses('parameter', known.parameter_addresses),
        replay_addresses=_addresses('replay', known.replay_addresses),
        parameter_ports=_ports('parameter', known.parameter_ports),
        replay_ports=_ports('replay', known.replay_ports),
        beam_flags=tuple(rest),
        host=known.host,
        work_dir=known.work_dir,
        tls=_tls(known),
        tls_roots=known.tls_roots or known.tls_certificate,
        actor_flags=of_jobs[0],
        learner_flags=of_jobs[1],
    )
    _require_directories(launch)
    return launch, known.preset, {**values, **_attached_shards(launch, values)}


def _require_directories(launch: Launch) -> None:
    """Raises UsageError when a directory is missing, or one that means nothing is given."""
    if launch.run_dir == '':
        raise UsageError('--run_dir is empty; name a directory, or leave the flag out.')
    if launch.resume and launch.run_dir is None:
        raise UsageError('--resume needs --run_dir: the directory of the run to go on with.')
    if launch.work_dir is not None and not (launch.work_dir and is_remote(launch.run_dir or '')):
        raise UsageError('--work_dir is the local copy of a remote --run_dir, such as gs://...')


def _attached_shards(launch: Launch, values: Mapping[str, Any]) -> dict[str, int]:
    """How many shards there are, by their setting, of the kinds that the run attaches to.

    Raises:
      UsageError: a flag says another number.
    """
    found = {}
    for kind in ('parameter', 'replay'):
        count, setting = len(getattr(launch, f'{kind}_addresses')), f'num_{kind}_shards'
        if count and values.get(setting, count) != count:
            raise UsageError(
                f'--{setting} {values[setting]} contradicts --{kind}_addresses, which names'
                f' {count}; leave the flag out.'
            )
        if count:
            found[setting] = count
    return found


def experiment(preset: str | None, values: dict[str, Any]) -> config_lib.ExperimentConfig:
    """The experiment of a new run.

    Raises:
      UsageError: an unknown preset, or values that are wrong, contradict each other or would
        change nothing; or the game cannot be played.
    """
    if isinstance(values.get('game'), str):
        values = {**values, 'game': _game(values['game'])}
    config = presets.experiment(preset or presets.DEFAULT, values)
    require_effect(config, values)
    return config


def resumed(
    before: config_lib.ExperimentConfig, preset: str | None, values: dict[str, Any]
) -> config_lib.ExperimentConfig:
    """The experiment of a run that goes on from `before`.

    Raises:
      UsageError: a flag would change what the run has learned with so far, or the game cannot be
        played here.
    """
    if preset not in (None, before.preset):
        raise UsageError(
            f'--preset {preset} contradicts --resume: the run was started with {before.preset};'
            ' leave the flag out, or start a new run.'
        )
    for name, value in values.items():
        group, _ = config_lib.fields()[name]
        old = getattr(getattr(before, group), name)
        if value != old and name not in RESUMABLE:
            raise UsageError(
                f'--{name} {value} contradicts --resume: the run was started with {old};'
                ' leave the flag out, or start a new run.'
            )
    _game(before.environment.game)
    return config_lib.replace(before, values)
