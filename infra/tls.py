"""TLS of the parameter shards: PEM files in, what Arrow Flight takes out."""

import re
import ssl

_CERTIFICATE = re.compile(b'-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----', re.DOTALL)


class TlsError(ValueError):
    """A file cannot be read or is not what it should be; the message names it and the remedy."""


def read_pair(certificate_file: str, key_file: str) -> tuple[bytes, bytes]:
    """A server's certificate, with those that it is signed by behind it, and its key, both PEM.

    Raises:
      TlsError: a file cannot be read, holds no PEM, or the key is another certificate's.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_file, key_file)
        return _read(certificate_file), _read(key_file)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f'--tls_certificate {certificate_file}, --tls_key {key_file}: no certificate and its'
            f' key in PEM ({error})'
        ) from error


def read_roots(file: str) -> bytes:
    """Certificates that those of servers are signed by, PEM; of a key in the same file nothing.

    Raises:
      TlsError: the file cannot be read, or holds none.
    """
    try:
        ssl.create_default_context(cafile=file)
        return b'\n'.join(_CERTIFICATE.findall(_read(file)))  # they travel: a key must not
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f'--tls_roots {file}: no certificates in PEM ({error})') from error


def _read(file: str) -> bytes:
    with open(file, 'rb') as stream:
        return stream.read()
