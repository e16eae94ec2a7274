"""TLS of the parameter shards: PEM files in, contexts of servers and clients out."""

import contextlib
import re
import ssl

_CERTIFICATE = re.compile(b'-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----', re.DOTALL)


class TlsError(ValueError):
    """A file is unreadable or invalid; the message names it and the reason."""


def server_context(certificate_file: str, key_file: str) -> ssl.SSLContext:
    """The context of a server with a certificate chain and its key, both PEM.

    Raises:
      TlsError: a file is unreadable or not PEM, or the key does not belong to the certificate.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate_file, key_file)
        return context
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f'--tls_certificate {certificate_file}, --tls_key {key_file}: no certificate and its'
            f' key in PEM ({error})'
        ) from error


def client_context(roots: bytes) -> ssl.SSLContext:
    """The context of a client that accepts certificates signed by one of `roots`, PEM."""
    return ssl.create_default_context(cadata=roots.decode('ascii'))


def unverified_context() -> ssl.SSLContext:
    """The context of a client that accepts any certificate, for a probe, which sends no secrets."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def read_roots(file: str) -> bytes:
    """Reads root certificates, PEM; drops a key in the same file.

    Raises:
      TlsError: the file is unreadable or has no certificate.
    """
    try:
        ssl.create_default_context(cafile=file)
        return b'\n'.join(_CERTIFICATE.findall(_read(file)))  # sent to workers, unlike a key
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f'--tls_roots {file}: no certificates in PEM ({error})') from error


def require_accepted(pair: tuple[str, str], roots: str, host: str) -> None:
    """Checks, by a handshake in memory, that clients accept a server's certificate.

    Args:
      pair: files of the certificate and its key.
      roots: file of the accepted root certificates.
      host: name or address of the server as clients use it.

    Raises:
      TlsError: the certificate is for another name, expired, or not signed by one of `roots`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=roots).wrap_bio(
        to_client, to_server, server_hostname=host
    )
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLError as error:
        reason = getattr(error, 'verify_message', '') or str(error)
        raise TlsError(
            f'--tls_certificate {pair[0]}: workers would not accept it at {host}: {reason}; it must'
            f' name {host} (as an alternative name), and be signed by what is in {roots}'
        ) from error


def _read(file: str) -> bytes:
    with open(file, 'rb') as stream:
        return stream.read()
