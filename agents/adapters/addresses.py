"""Addresses of servers, as a user gives them."""

from collections.abc import Sequence


def require_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses, each `host:port`.

    Raises:
      ValueError: there are none, or one is not an address.
    """
    if isinstance(addresses, str):
        raise ValueError(f'addresses are {addresses!r}; give a list of host:port')
    for address in addresses:
        host, _, port = address.rpartition(':')
        if not host or not port.isdigit():
            raise ValueError(f'{address!r} is no address; give host:port')
    if not addresses:
        raise ValueError('there are no addresses; give host:port of every shard')
    return tuple(addresses)
