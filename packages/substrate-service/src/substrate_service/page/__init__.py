"""The live page of an admin listener: one document that asks `/v1/live` of its own origin, and nobody else, for all."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

Fields = tuple[tuple[bytes, bytes], ...]


@cache
def page() -> tuple[Fields, bytes]:
    """The document and the fields it is served with.

    They let exactly its own script and style run, whatever might get into it, and keep it out of other sites' frames.
    """
    document = files("substrate_service.page").joinpath("page.html").read_bytes()
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest_of(document, b'script')}'",
            f"style-src '{_digest_of(document, b'style')}'",
            "connect-src 'self'",
            "img-src data:",  # its icon, so that nobody asks for /favicon.ico
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    return (
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"cache-control", b"no-store"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ), document


def _digest_of(document: bytes, element: bytes) -> str:
    """What a policy calls the one element of that name."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), document, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"
