"""Certificates for tests: of an authority, of a server on loopback, and of a stranger."""

import pathlib

import trustme


def issue(directory: pathlib.Path, *names: str) -> dict[str, str]:
    """Paths of new PEM files: an authority's `roots`, a server's `certificate` and `key`, for these
    names or for loopback, and another authority's roots, `other`."""
    authority, stranger = trustme.CA(), trustme.CA()
    server = authority.issue_cert(*(names or ('127.0.0.1', 'localhost')))
    kinds = ('roots', 'certificate', 'key', 'other')
    paths = {kind: str(directory / f'{kind}.pem') for kind in kinds}
    authority.cert_pem.write_to_path(paths['roots'])
    for pem in server.cert_chain_pems:
        pem.write_to_path(paths['certificate'], append=True)
    server.private_key_pem.write_to_path(paths['key'])
    stranger.cert_pem.write_to_path(paths['other'])
    return paths
