"""Addresses of servers, `host:port` with an IPv6 host in brackets: text in, host and port out."""

import os
from collections.abc import Iterable, Sequence

_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class AddressError(ValueError):
    """A text is not an address; the message gives the format."""


def split_address(address: str) -> tuple[str, int]:
    """Splits an address into host, without brackets, and port.

    Raises:
      AddressError: `address` is not `host:port`.
    """
    host, _, port = address.rpartition(':')
    if not host or not is_port(port):
        raise AddressError(f'{address!r} is no address; write host:port, port 1 to 65535')
    return host.strip('[]'), int(port)


def is_port(text: str) -> bool:
    """Whether the text is a port number, 1 to 65535."""
    return text.isascii() and text.isdigit() and 0 < int(text) < 65_536


def require_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """Checks that every address is `host:port` and returns them.

    Raises:
      ValueError: the list is empty, or an entry is not an address.
    """
    if isinstance(addresses, str):
        raise ValueError(f'addresses are {addresses!r}; give a list of host:port')
    for address in addresses:
        split_address(address)
    if not addresses:
        raise ValueError('there are no addresses; give host:port of every shard')
    return tuple(addresses)


def reach_directly(addresses: Iterable[str], *hosts: str) -> None:
    """Excludes addresses, hosts and loopback from the proxy, for this process and its children.

    gRPC (of Reverb and Beam) uses `http_proxy`, `https_proxy` or `grpc_proxy` for every
    host except those in `no_grpc_proxy`, or else in `no_proxy`. This function extends both
    variables, which affects later connections. Other hosts keep using the proxy.

    Raises:
      AddressError: an address is not `host:port`.
    """
    direct = [*_LOOPBACK, *(split_address(address)[0] for address in addresses), *hosts]
    environment = os.environ
    general = environment.get('no_proxy') or environment.get('NO_PROXY') or ''
    grpc = environment.get('no_grpc_proxy') or general
    environment['no_grpc_proxy'] = _with(grpc, direct)
    if general.strip() != '*':  # a lone asterisk excludes every host already
        environment['no_proxy'] = _with(general, direct)


def _with(names: str, more: Iterable[str]) -> str:
    """Appends names to a comma-separated list, without blanks, which Reverb's gRPC rejects."""
    return ','.join(dict.fromkeys([*filter(None, map(str.strip, names.split(','))), *more]))
