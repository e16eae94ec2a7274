"""Certificates for tests: of an authority, of a server on loopback, and of a stranger."""

import pathlib

import trustme


def issue(directory: pathlib.Path) -> dict[str, str]:
    """Paths of new PEM files: the authority's `roots`, a server's `certificate` and `key`, and
    another authority's, `other`."""
    authority, stranger = trustme.CA(), trustme.CA()
    server = authority.issue_cert('127.0.0.1', 'localhost')
    names = ('roots', 'certificate', 'key', 'other')
    paths = {name: str(directory / f'{name}.pem') for name in names}
    authority.cert_pem.write_to_path(paths['roots'])
    for pem in server.cert_chain_pems:
        pem.write_to_path(paths['certificate'], append=True)
    server.private_key_pem.write_to_path(paths['key'])
    stranger.cert_pem.write_to_path(paths['other'])
    return paths
