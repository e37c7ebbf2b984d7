"""The wire's TLS: both ends show a certificate of one authority, and plain text stays on one machine."""

from __future__ import annotations

import ssl
from pathlib import Path

PLAINTEXT_DANGER = "whoever reaches a wire in plain text commands the node"


class CertificateUnusable(Exception):
    """The wire's TLS cannot be set up from these files; the message names the file and what is wrong with it."""


def client_context(*, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """What an agent connects with: made once, since making one costs milliseconds. Raises `CertificateUnusable`.

    `server_hostname` must be the node's id: a certificate in another name is refused.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, cert=cert, key=key, ca=ca)


def server_context(*, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """What a node listens with: a client without a certificate of `ca` is refused. Raises `CertificateUnusable`."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, cert=cert, key=key, ca=ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def plaintext_refusal(prefix: str, *, tls: bool, loopback: bool, insecure: bool) -> str | None:
    """Why the wire must not be spoken like this, and which settings, by their `prefix`, would help; None if it may."""
    if tls or loopback or insecure:
        return None
    return (
        f"{PLAINTEXT_DANGER}; set {prefix}TLS_CERT_FILE, _KEY_FILE and _CA_FILE, "
        f"or {prefix}INSECURE_WIRE=true on a network that you trust with everything"
    )


def _context(protocol: int, *, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for path in (cert, key, ca):
        try:
            path.open("rb").close()
        except OSError as error:
            raise CertificateUnusable(f"{path}: {error.strerror}") from error
    try:
        context.load_verify_locations(cafile=ca)
    except ssl.SSLError as error:
        raise CertificateUnusable(f"{ca}: no authority's certificate in PEM ({error})") from error
    try:
        context.load_cert_chain(cert, key, password="")  # or OpenSSL would ask for one at the terminal
    except OSError as error:
        why = f"no certificate and its key, without a password, in PEM ({error})"
        raise CertificateUnusable(f"{cert} and {key}: {why}") from error
    return context
