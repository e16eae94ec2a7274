"""Does a shard serve? Its address in, the answer of the shard itself out: an exit code and a line.

`python -m infra.probe parameter HOST:PORT` or `... replay HOST:PORT` (several addresses are
separated by commas, as in the flags of a run): 0 when every shard answers the question that a run
asks it, 1 when one does not within the bound, 2 for bad input. A listening port would say less: a
process that hangs still has one. TensorFlow is not imported, so a probe takes 0.2 s.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

from infra.addresses import require_addresses
from infra.flags import positive_number

_TIMEOUT_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
# Reverb's own service. Its request is a message without fields: no bytes at all.
_SERVER_INFO = '/deepmind.reverb.ReverbService/ServerInfo'


class NoAnswer(Exception):
    """A shard does not answer, or not as one of its kind; the message says what came instead."""


def ask_parameter_shard(address: str, timeout_seconds: float, tls: bool = False) -> str:
    """Asks a parameter shard for its report; returns what it is, in a few words.

    With `tls` its certificate is not verified: who asks whether a shard lives sends it nothing, and
    a shard asked on its own host has no name of the certificate there.

    Raises:
      NoAnswer: nothing came within the time, or no report.
    """
    import pyarrow as pa
    import pyarrow.flight as flight

    scheme = 'grpc+tls' if tls else 'grpc'
    options = flight.FlightCallOptions(timeout=timeout_seconds)
    try:
        with flight.FlightClient(
            f'{scheme}://{address}', disable_server_verification=tls
        ) as client:
            (answer,) = client.do_action(flight.Action('health', b''), options)
            report = json.loads(answer.body.to_pybytes())
            return f'parameter shard {report["shard"]}, update {report["version"]}'
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise NoAnswer(_one_line(error)) from error


def ask_replay_shard(address: str, timeout_seconds: float, tls: bool = False) -> str:
    """Asks a replay shard for its tables; returns how large the answer is, in a few words.

    Raises:
      NoAnswer: nothing came within the time, or something else listens there.
      ValueError: `tls`, which Reverb does not speak.
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
    """Asks every shard, and again until all have answered or `wait_seconds` are over.

    Returns:
      What each of them is, in the order of the addresses.

    Raises:
      NoAnswer: one did not answer; the message names it.
      ValueError: the question does not fit the kind.
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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m infra.probe', description=__doc__, allow_abbrev=False
    )
    parser.add_argument('kind', choices=sorted(QUESTIONS))
    parser.add_argument('addresses', help='host:port of a shard, or of several: a:1,b:2')
    parser.add_argument(
        '--timeout_seconds',
        type=positive_number,
        default=_TIMEOUT_SECONDS,
        help=f'for one answer of one shard [{_TIMEOUT_SECONDS:g}]',
    )
    parser.add_argument(
        '--wait_seconds',
        type=positive_number,
        default=0.0,
        help='ask again until this time is over [one question only]',
    )
    parser.add_argument('--tls', action='store_true', help='the parameter shard has a certificate')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Asks, prints one line, returns the exit code."""
    options = _parse(arguments)
    try:
        addresses = require_addresses(options.addresses.split(','))
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
