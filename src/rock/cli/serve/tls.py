"""The TLS certificate of a server."""

from __future__ import annotations

from typing import Any

from rock.errors import InvalidConfig
from rock.settings import Settings


def tls_of(settings: Settings) -> dict[str, Any]:
    """uvicorn's options for a certificate; InvalidConfig when it is unusable."""
    if not settings.tls_cert and not settings.tls_key:
        return {}
    if not settings.tls_cert or not settings.tls_key:
        raise InvalidConfig("TLS needs a certificate and its key", hint="--tls-cert FILE --tls-key FILE")
    import ssl

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without the second argument, a key with a passphrase would prompt on the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(
            f"TLS cannot be had with {settings.tls_cert} and {settings.tls_key}: {error.strerror or error}",
            hint="PEM files that this user may read, the key without a passphrase",
        ) from None
    return {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
