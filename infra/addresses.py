"""Addresses of servers as users give them: `host:port`, an IPv6 host in brackets."""

from collections.abc import Sequence


class AddressError(ValueError):
    """A text that is no address; the message says what one is."""


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
      AddressError: it is not `host:port`.
    """
    host, _, port = address.rpartition(':')
    if not host or not is_port(port):
        raise AddressError(f'{address!r} is no address; write host:port, port 1 to 65535')
    return host.strip('[]'), int(port)


def is_port(text: str) -> bool:
    """Whether the text is the number of a port."""
    return text.isascii() and text.isdigit() and 0 < int(text) < 65_536


def require_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses, each `host:port`.

    Raises:
      ValueError: there are none, or one is not an address.
    """
    if isinstance(addresses, str):
        raise ValueError(f'addresses are {addresses!r}; give a list of host:port')
    for address in addresses:
        split_address(address)
    if not addresses:
        raise ValueError('there are no addresses; give host:port of every shard')
    return tuple(addresses)
