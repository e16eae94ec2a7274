"""Probes shards: addresses in, an exit code and one line with their replies out.

`python -m infra.probe parameter HOST:PORT` or `... replay HOST:PORT` takes several addresses
separated by commas, as the flags of a run do. It exits with 0 if every shard replies to a run's
question, with 1 if one does not reply within the bound, and with 2 on bad input. A check of the
port would not suffice, because a hanging process still listens. A probe takes 0.2 s, since it does
not import TensorFlow.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from infra.addresses import reach_directly, require_addresses
from infra.flags import Parser, positive_number

_TIMEOUT_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
# Reverb's own service. Its request has no fields, so it is empty.
_SERVER_INFO = '/deepmind.reverb.ReverbService/ServerInfo'


class NoAnswer(Exception):
    """A shard does not reply, or not as one of its kind; the message gives the reason."""


def ask_parameter_shard(address: str, timeout_seconds: float, tls: bool = False) -> str:
    """Asks a parameter shard for its report and returns a short summary.

    With `tls` it does not verify the certificate. A probe sends no secrets, and the certificate
    does not name a shard's loopback address.

    Raises:
      NoAnswer: the shard sends no report within the time.
    """
    from infra.parameter_server import health
    from infra.tls import unverified_context

    try:
        report = health.ask(address, timeout_seconds, unverified_context() if tls else None)
        return f'parameter shard {report["shard"]}, update {report["version"]}'
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoAnswer(_one_line(error)) from error


def ask_replay_shard(address: str, timeout_seconds: float, tls: bool = False) -> str:
    """Asks a replay shard for its tables and returns a short summary.

    Raises:
      NoAnswer: no reply arrives within the time, or another server listens there.
      ValueError: `tls` is set, which Reverb does not support.
    """
    import grpc  # type: ignore[import-untyped]

    if tls:
        raise ValueError('--tls: a replay shard speaks no TLS; leave it out')
    try:
        with grpc.insecure_channel(address) as channel:
            answer = channel.unary_unary(_SERVER_INFO)(b'', timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise NoAnswer(f'{error.code().name}: {_one_line(error.details())}') from error
    if not answer:
        raise NoAnswer('an answer without tables')
    return f'replay shard, {len(answer)} bytes about its tables'


QUESTIONS: dict[str, Callable[[str, float, bool], str]] = {
    'parameter': ask_parameter_shard,
    'replay': ask_replay_shard,
}


def probe(
    kind: str,
    addresses: Sequence[str],
    timeout_seconds: float = _TIMEOUT_SECONDS,
    wait_seconds: float = 0.0,
    tls: bool = False,
) -> list[str]:
    """Asks the shards in turn, repeatedly until all reply or `wait_seconds` pass.

    Returns:
      A summary of each shard, in the order of the addresses.

    Raises:
      NoAnswer: a shard does not reply; the message names it.
      ValueError: `tls` is set for replay shards.
    """
    deadline = time.monotonic() + wait_seconds
    answers: list[str] = []
    while len(answers) < len(addresses):
        address = addresses[len(answers)]
        try:
            answers.append(QUESTIONS[kind](address, timeout_seconds, tls))
        except NoAnswer as error:
            if time.monotonic() + _PAUSE_SECONDS > deadline:
                raise NoAnswer(f'{address}: no {kind} shard answers ({error})') from error
            time.sleep(_PAUSE_SECONDS)
    return answers


def _one_line(error: object) -> str:
    return ' '.join(str(error).split())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog='python -m infra.probe', description=__doc__, allow_abbrev=False)
    parser.add_argument('kind', choices=sorted(QUESTIONS), help='Kind of the shards.')
    parser.add_argument('addresses', metavar='HOST:PORT,...', help='Addresses of the shards.')
    parser.add_argument(
        '--timeout_seconds',
        type=positive_number,
        default=_TIMEOUT_SECONDS,
        help=f'Seconds to wait for one answer. Default: {_TIMEOUT_SECONDS:g}.',
    )
    parser.add_argument(
        '--wait_seconds',
        type=positive_number,
        default=0.0,
        help='Seconds for which to retry. Default: ask once.',
    )
    parser.add_argument(
        '--tls', action='store_true', help='Connect to parameter shards that use TLS.'
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probes the shards, prints one line and returns the exit code."""
    options = parse(arguments)
    try:
        addresses = require_addresses(options.addresses.split(','))
        reach_directly(addresses)
        answers = probe(
            options.kind, addresses, options.timeout_seconds, options.wait_seconds, options.tls
        )
    except ValueError as error:
        print(f'probe: {error}', file=sys.stderr)
        return 2
    except NoAnswer as error:
        print(error, file=sys.stderr)
        return 1
    print('; '.join(answers))
    return 0


if __name__ == '__main__':
    sys.exit(main())
