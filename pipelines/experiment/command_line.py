"""Command-line flags in, frozen `Launch` and `ExperimentConfig` out.

Each field of the configuration dataclasses is a flag of the same name. Beam's own flags are
accepted too; any other flag is an error.
"""

import argparse
import contextlib
import dataclasses
import difflib
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agents.config import EnvironmentConfig
from agents.environments.factory import check_name
from agents.games import GameError, not_taken_over
from infra.addresses import AddressError, is_port, split_address
from infra.disk import is_remote
from infra.flags import as_flag, integer, nonempty, value_of, with_fix
from infra.tls import TlsError, read_roots, server_context
from pipelines.engines import catalog
from pipelines.errors import UsageError
from pipelines.experiment import config as config_lib
from pipelines.experiment import job_settings, presets, protocols
from pipelines.experiment.launch import LOOPBACK, Launch
from pipelines.experiment.protocols import RUN_PROTOCOLS
from pipelines.experiment.unused_flags import require_effect

_EPILOG = """examples:
  .venv/bin/python pipelines/run.py --runner=DirectRunner
  .venv/bin/python pipelines/run.py --game breakout --preset nature --run_dir runs/breakout
  .venv/bin/python pipelines/run.py --topology bundled --num_actors 2 --num_learners 2
  .venv/bin/python pipelines/run.py --run_dir runs/breakout --resume

A frame is an emulator frame, an update a gradient that the parameter server has applied.
Defaults are those of the preset `{preset}`. `--preset NAME --help` shows those of another.
Beam's own flags are accepted too; `--help_beam` lists them.
"""

_TLS_HELP = {
    'tls_certificate': 'PEM certificate for --host; makes the parameter shards that the run starts'
    ' use TLS (see docs/training.md). Default: no TLS.',
    'tls_key': 'PEM private key of --tls_certificate; never leaves this machine.',
    'tls_roots': 'PEM root certificates that verify the parameter shards; sent to the workers.'
    ' Default: --tls_certificate.',
}
_KINDS = ('actor', 'learner')
_EXTRA: Mapping[type, Mapping[str, Any]] = {
    bool: {'action': argparse.BooleanOptionalAction},
    int: {'type': integer, 'metavar': 'N'},
    float: {'type': float, 'metavar': 'X'},
    str: {'type': nonempty, 'metavar': 'NAME'},
}
"""Arguments of `add_argument`, by a field's type."""

# Settings that --resume may change, because they do not invalidate what was learned.
RESUMABLE = frozenset(
    {
        'max_frames',
        'num_actors',
        'num_learners',
        'num_parameter_shards',
        'worker_threads',
        'learner_device',
        'precision',
        'checkpoint_period_seconds',
        'checkpoint_replay',
        'evaluation_episodes',
        'evaluation_epsilon',
        'evaluation_max_frames',
        'evaluator_cpu_share',
        'evaluator_episodes',
        'evaluation_period_updates',
        'video',
        'max_staleness',
        'learning_rate',
        'learning_rate_end',
        'learning_rate_updates',
        'average_updates',
        'wire',
        'shared_memory',
    }
)


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    launch = parser.add_argument_group('launch')
    launch.add_argument(
        '--preset',
        help='Named set of values, which other flags override (see docs/algorithms.md):'
        f' {", ".join(presets.PRESETS)}. Default: {presets.DEFAULT}.',
    )
    launch.add_argument(
        '--run_dir',
        type=nonempty,
        help='Output directory, or a URL that Beam can write, such as gs://bucket/path: the run'
        ' then works in a local copy and mirrors it there (see docs/gcs.md).'
        ' Default: runs/<game>-<preset>-<time>.',
    )
    launch.add_argument(
        '--work_dir',
        type=nonempty,
        help='Local copy of a remote --run_dir. Default: runs/<its last part>, numbered if another'
        ' run uses that name.',
    )
    launch.add_argument(
        '--resume', action='store_true', help='Continue from the last checkpoint in --run_dir.'
    )
    launch.add_argument(
        '--wandb_project',
        metavar='NAME',
        help='Project of Weights & Biases that also receives figures, settings and summary (see'
        ' docs/training.md). Name it again to continue it with --resume. Default: none.',
    )
    for kind, job in zip(_KINDS, ("actors'", "learners' or bundles'")):
        launch.add_argument(
            f'--{kind}_flags',
            default='',
            help=f'Beam flags of the {job} job only, such as'
            f' --{kind}_flags=--worker_machine_type=n2-standard-4.',
        )


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_argument_group('servers')
    for kind in ('parameter', 'replay'):
        servers.add_argument(
            f'--{kind}_addresses',
            type=nonempty,
            metavar='HOST:PORT,...',
            help=f'Running {kind} shards to attach to, in shard order. Default: start new ones.',
        )
        servers.add_argument(
            f'--{kind}_ports',
            type=nonempty,
            metavar='PORT,...',
            help=f'Ports of the {kind} shards that the run starts. Default: free ones.',
        )
    for name, text in _TLS_HELP.items():
        servers.add_argument(f'--{name}', type=nonempty, metavar='FILE', help=text)
    servers.add_argument(
        '--host',
        type=nonempty,
        default=LOOPBACK,
        help='Address of this machine at which workers reach the servers that the run starts; set'
        f' it if workers run on other machines. Default: {LOOPBACK}.',
    )


MAX_STEPS = 'max_steps'
"""Flag of a budget in agent steps, which is no setting of its own."""
ENVIRONMENT = 'environment'
"""Other flag of the setting `game`; values bear the name that was given, which errors repeat."""
_SETTINGS = {ENVIRONMENT: 'game', MAX_STEPS: 'max_frames'}
"""Settings of flags with other names."""
_MISTAKEN = {'--network': '--q_network', '--num_workers': '--num_actors and --num_learners'}
"""Beam's flags for Dataflow alone, and ours that a user may mean elsewhere."""


class _Spelled(argparse.Action):
    """Stores a value under the name of the flag that was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, option_string.removeprefix('--'), values)


def _add_arguments(parser: argparse.ArgumentParser, preset: str) -> None:
    """Adds the project's flags, with the preset's values in their help texts."""
    _add_launch_arguments(parser)
    _add_server_arguments(parser)
    jobs = parser.add_argument_group('jobs of Beam')
    jobs.add_argument(
        '--one_job',
        action='store_true',
        help='Actors and learners are one job, on an engine that runs all steps of a job at once'
        f' ({", ".join(catalog.SIDE_BY_SIDE)}; PrismRunner with one of each). Default: a job for'
        ' all actors and one for all learners; on Prism a job for each worker.',
    )
    job_settings.add_arguments(jobs)
    parser.add_argument(
        f'--{MAX_STEPS}',
        type=integer,
        metavar='N',
        help='Agent steps of all actors after which the run ends, in place of --max_frames.',
    )
    default = presets.experiment(preset, {})
    for group, config in config_lib.groups():
        arguments = parser.add_argument_group(group.replace('_', ' '))
        kinds = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            value = getattr(getattr(default, group), field.name)
            text = f'{field.metadata["help"]} Default: {value}.'.replace('%', '%%')
            extra = _EXTRA[kinds[field.name]]
            names = [f'--{field.name}']
            if field.name == 'game':
                names, extra = [f'--{ENVIRONMENT}', *names], {**extra, 'action': _Spelled}
            arguments.add_argument(*names, dest=field.name, default=None, help=text, **extra)


def _parser(own_only: bool, preset: str = presets.DEFAULT) -> argparse.ArgumentParser:
    """Builds a strict parser of the project's flags, and of Beam's unless `own_only`."""
    parser = argparse.ArgumentParser(
        prog='run.py',
        usage='run.py [flags]',
        description='Train a DQN agent with parallel actors, parallel learners, a sharded'
        ' replay and a sharded parameter server.',
        epilog=_EPILOG.format(preset=preset),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        conflict_handler='resolve',
    )
    if not own_only:
        _add_beam_arguments(parser)
    else:
        parser.add_argument(
            '--runner',
            type=nonempty,
            default='DirectRunner',
            help='Engine that runs the workers (see docs/engines.md):'
            f' {", ".join(catalog.ENGINES)}. Default: DirectRunner.',
        )
        parser.add_argument('--help_beam', action='store_true', help='Also list the flags of Beam.')
    _add_arguments(parser, preset)
    return parser


def _add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    from apache_beam.options.pipeline_options import PipelineOptions

    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(_BeamArguments(parser))


class _BeamArguments:
    """Adapts an argparse parser to the parser class that Beam's option classes expect."""

    def __init__(self, parser: argparse.ArgumentParser):
        self._parser = parser

    def add_value_provider_argument(self, *args: Any, **kwargs: Any) -> None:
        self._parser.add_argument(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def _reject_unknown(
    unknown: Sequence[str], parser: argparse.ArgumentParser, engine: catalog.Engine
) -> None:
    """Raises UsageError for an unknown flag and suggests similar ones.

    If the engine forwards flags to a job server, only flags similar to known ones are rejected.
    """
    for text in unknown:
        flag = text.split('=')[0]
        known = list(parser._option_string_actions)
        if engine.forwards and not difflib.get_close_matches(flag, known, cutoff=0.8):
            continue
        near = difflib.get_close_matches(flag, known, n=3)
        hint = f' (did you mean {" or ".join(near)}?)' if near else ''
        raise UsageError(f'{text}: unknown flag{hint}. Fix: see --help.')


def require_known(engine: catalog.Engine, flags: Sequence[str]) -> None:
    """Checks that `flags` are Beam's, for commands other than run.py.

    Raises:
      UsageError: a flag is unknown, or its value is invalid.
    """
    engine.register_flags()
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, conflict_handler='resolve'
    )
    _add_beam_arguments(parser)
    try:
        _reject_unknown(parser.parse_known_args(flags)[1], parser, engine)
    except argparse.ArgumentError as error:
        raise UsageError(with_fix(error, 'see --help')) from error


def _addresses(kind: str, text: str | None) -> tuple[str, ...]:
    """Parses a comma-separated list of host:port."""
    addresses = tuple(part.strip() for part in (text or '').split(',') if part.strip())
    for address in addresses:
        try:
            split_address(address)
        except AddressError as error:
            raise UsageError(f'--{kind}_addresses: {error}.') from error
    return addresses


def _split(kind: str, text: str) -> tuple[str, ...]:
    """Splits the value of --actor_flags or --learner_flags into Beam flags."""
    try:
        flags = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f'--{kind}_flags {text!r}: {error}. Fix: close the quotes.') from error
    beams = _parser(own_only=True).parse_known_args(flags)[1]
    for flag in flags:
        if flag not in beams:
            raise UsageError(
                f'--{kind}_flags: {flag} is not a Beam flag. Fix: pass it directly to run.py.'
            )
    return flags


def _ports(kind: str, text: str | None) -> tuple[int, ...]:
    """Parses a comma-separated list of ports."""
    parts = [part.strip() for part in (text or '').split(',') if part.strip()]
    for part in parts:
        if not is_port(part):
            raise UsageError(f'--{kind}_ports {text}: {part!r} is not a port. Fix: use 1 to 65535.')
    return tuple(int(part) for part in parts)


def _game(text: str, flag: str = '') -> str:
    """Returns the ROM that `text` names; prints a note on Gymnasium IDs.

    Raises:
      UsageError: the game is unknown or cannot be played; names the `flag`, if one was given.
    """
    try:
        game = check_name(text)
    except ValueError as error:
        named = flag or ('game' if isinstance(error, GameError) else ENVIRONMENT)
        raise UsageError(f'--{named}: {error}') from error
    if note := not_taken_over(text):
        print(f'--{flag or "game"} {note}', file=sys.stderr, flush=True)
    return game


def _tls(known: argparse.Namespace) -> tuple[str, str] | None:
    """Returns the files of certificate and key, or None without TLS.

    Raises:
      UsageError: a file is missing, unreadable or invalid.
    """
    if bool(known.tls_certificate) != bool(known.tls_key):
        raise UsageError('--tls_certificate and --tls_key go together. Fix: pass both or neither.')
    try:
        if known.tls_roots:
            read_roots(known.tls_roots)
        if known.tls_certificate:
            server_context(known.tls_certificate, known.tls_key)
            return known.tls_certificate, known.tls_key
    except TlsError as error:
        raise UsageError(f'{error}.') from error
    return None


def _flags_of_jobs(known: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the Beam flags of each kind of job, in the order of `_KINDS`; checks `rest` too.

    Raises:
      UsageError, argparse.ArgumentError: a flag is unknown or reserved.
      SystemExit: --help_beam was printed.
    """
    engine = catalog.engine(known.runner)
    of_jobs = [_split(kind, getattr(known, f'{kind}_flags')) for kind in _KINDS]
    if not (known.help_beam or rest or any(of_jobs)):
        return of_jobs  # without Beam, whose import takes seconds
    engine.register_flags()
    every = _parser(False, presets.DEFAULT if known.preset is None else known.preset)
    if known.help_beam:
        every.print_help()
        raise SystemExit(0)
    for flags in (rest, *of_jobs):
        _reject_unknown(every.parse_known_args(flags)[1], every, engine)
        catalog.require_free(known.runner, flags)
        _require_meant(known.runner, flags)
    return of_jobs


def _require_meant(runner: str, flags: Sequence[str]) -> None:
    """
    Raises:
      UsageError: a flag has no effect on the engine, and ours with a like name has.
    """
    for flag, ours in _MISTAKEN.items():
        if runner != 'DataflowRunner' and (value := value_of(flag, flags)) is not None:
            raise UsageError(
                f'{flag} {value}: no effect on {runner} (did you mean {ours}?). Fix: omit {flag}.'
            )


def parse(argv: Sequence[str]) -> tuple[Launch, str | None, dict[str, Any]]:
    """Parses the command line into launch, preset name (None if not given) and overridden values.

    Raises:
      UsageError: a flag is unknown, or its value missing or invalid.
      SystemExit: help was printed.
    """
    try:
        preset = value_of('--preset', argv)
        if preset is None:
            named = value_of('--environment', argv) or value_of('--game', argv)
            preset = presets.default(named or EnvironmentConfig().game)
        known, rest = _parser(own_only=True, preset=preset).parse_known_args(argv)
        of_jobs = _flags_of_jobs(known, rest)
    except argparse.ArgumentError as error:
        raise UsageError(with_fix(error, 'see --help')) from error
    values = _values(known)
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
        wandb_project=known.wandb_project,
        one_job=known.one_job,
        jobs=job_settings.from_arguments(known),
    )
    _require_directories(launch)
    return launch, known.preset, {**values, **_attached_shards(launch, values)}


def _values(known: argparse.Namespace) -> dict[str, Any]:
    """The settings of the experiment that are given, by name.

    Raises:
      UsageError: the game is unknown or cannot be played, or two are named.
    """
    values = {
        name: getattr(known, name)
        for name in (ENVIRONMENT, *config_lib.fields())
        if getattr(known, name, None) is not None
    }
    games = {flag: values[flag] for flag in (ENVIRONMENT, 'game') if flag in values}
    values |= {flag: _game(text, flag) for flag, text in games.items()}
    if len(games) > 1 and values[ENVIRONMENT] != values.pop('game'):
        raise UsageError(
            f'--{ENVIRONMENT} {games[ENVIRONMENT]}: contradicts --game {games["game"]}. Fix: omit'
            ' one of them.'
        )
    if known.max_steps is not None:
        values[MAX_STEPS] = known.max_steps
    return values


def _require_directories(launch: Launch) -> None:
    """Raises UsageError if --run_dir, --resume and --work_dir do not fit together."""
    if launch.resume and launch.run_dir is None:
        raise UsageError('--resume: no run given. Fix: name the directory of the run in --run_dir.')
    if launch.work_dir is not None and not is_remote(launch.run_dir or ''):
        raise UsageError(
            '--work_dir: --run_dir is not remote, so the run needs no local copy. Fix: omit it.'
        )


def _attached_shards(launch: Launch, values: Mapping[str, Any]) -> dict[str, int]:
    """Settings for the numbers of attached shards, from the addresses.

    Raises:
      UsageError: a flag contradicts the number of addresses.
    """
    found = {}
    for kind in ('parameter', 'replay'):
        count, setting = len(getattr(launch, f'{kind}_addresses')), f'num_{kind}_shards'
        if count and values.get(setting, count) != count:
            raise UsageError(
                f'--{setting} {values[setting]}: contradicts --{kind}_addresses, which names'
                f' {count}. Fix: omit --{setting}.'
            )
        if count:
            found[setting] = count
    return found


def experiment(preset: str | None, values: dict[str, Any]) -> config_lib.ExperimentConfig:
    """Returns the experiment of a new run.

    Raises:
      UsageError: the preset is unknown; the game cannot be played; or values are invalid,
        contradictory or without effect.
    """
    values, steps = _without_flags(values)
    if isinstance(values.get('game'), str):
        values['game'] = _game(values['game'])
    game = values.get('game', EnvironmentConfig().game)
    preset = presets.default(game) if preset is None else preset
    if (rules := values.get('evaluation_protocol')) in RUN_PROTOCOLS and isinstance(game, str):
        environment = EnvironmentConfig(game=game)
        protocols.require_fit(rules, environment, '--evaluation_protocol', RUN_PROTOCOLS)
    frames = {name: values[name] for name in ('game', 'action_repeat') if name in values}
    repeat = presets.experiment(preset, frames).environment.action_repeat
    with _in_steps(steps, repeat) as budget:
        config = presets.experiment(preset, {**values, **budget})
    require_effect(config, values)
    return config


def resumed(
    before: config_lib.ExperimentConfig, preset: str | None, values: dict[str, Any]
) -> config_lib.ExperimentConfig:
    """Returns the experiment of a resumed run.

    Raises:
      UsageError: a flag would change a value that a run must keep, or the game cannot be played.
    """
    if preset not in (None, before.preset):
        raise UsageError(
            f'--preset {preset}: contradicts --resume, since the run was started with'
            f' {before.preset}. Fix: omit --preset, or start a new run.'
        )
    settings, steps = _without_flags(values)
    for name, value in values.items():
        setting = _SETTINGS.get(name, name)
        group, _ = config_lib.fields()[setting]
        old = getattr(getattr(before, group), setting)
        if value != old and setting not in RESUMABLE:
            raise UsageError(
                f'{as_flag(name, value)}: contradicts --resume, since the run was started with'
                f' {as_flag(name, old)}. Fix: omit it, or start a new run.'
            )
    _game(before.environment.game)
    with _in_steps(steps, before.environment.action_repeat) as budget:
        return config_lib.replace(before, {**settings, **budget})


def _without_flags(values: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The settings of the experiment by their names, and the budget of agent steps, if given.

    Raises:
      UsageError: a budget of frames is given, too.
    """
    if MAX_STEPS in values and 'max_frames' in values:
        raise UsageError('--max_steps: contradicts --max_frames. Fix: omit one of them.')
    settings = {_SETTINGS.get(name, name): values[name] for name in values if name != MAX_STEPS}
    return settings, values.get(MAX_STEPS)


@contextlib.contextmanager
def _in_steps(agent_steps: int | None, action_repeat: int) -> Iterator[dict[str, int]]:
    """Yields the setting for a budget of agent steps, empty without one; names it in errors."""
    if agent_steps is None:
        yield {}
        return
    frames = agent_steps * action_repeat
    try:
        yield {'max_frames': frames}
    except UsageError as error:
        text = str(error).replace(f'--max_frames {frames}', f'--{MAX_STEPS} {agent_steps}')
        raise UsageError(text) from error
