"""Access tokens of sandboxes, and the signatures of file URLs.

SDKs send no API key to a sandbox, but the token that the response to a create or connect contained. A token names the
key with which it was created, and is valid as long as that key. It contains a message authentication code and is
stored nowhere.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Mapping

from rock.admin.tenants import Keys
from rock.protocol.keys import OPERATOR, Caller

_TOKEN = re.compile(r"rocksbx_([0-9a-f]{0,32})_([0-9a-f]{40})")
_SIGNATURE = re.compile(r"v1_[A-Za-z0-9+/]{43}")
_ISSUED = 4096  # tokens that are remembered for signed URLs without a sandbox id


class Tokens:
    """Issues and checks tokens. secret: of the server. keys: the API keys of tenants."""

    def __init__(self, secret: bytes, keys: Keys) -> None:
        self._secret = hmac.digest(secret, b"rock e2b tokens", "sha256")
        self._keys = keys
        self._issued: OrderedDict[str, str] = OrderedDict()  # sandbox ids by token, the last used one at the end

    def access(self, sandbox_id: str, caller: Caller) -> str:
        """The token of a caller for one sandbox."""
        token = self._token("access", sandbox_id, caller.key_id)
        self._note(token, sandbox_id)
        return token

    def traffic(self, sandbox_id: str, caller: Caller) -> str:
        """The token of a caller for the ports of one sandbox, other than that of the daemon."""
        return self._token("traffic", sandbox_id, caller.key_id)

    async def caller(self, sandbox_id: str, token: str) -> Caller | None:
        """The caller with an access token for this sandbox; None for a wrong token, or one of a revoked key."""
        found = await self._holder("access", sandbox_id, token)
        if found is not None:
            self._note(token, sandbox_id)
        return found

    def upload(self, digest: str, caller: Caller) -> str:
        """The token of a caller for the upload of one file of a build."""
        return self._token("upload", digest, caller.key_id)

    async def uploader(self, digest: str, token: str) -> Caller | None:
        """The caller with a token for this upload."""
        return await self._holder("upload", digest, token)

    async def sender(self, sandbox_id: str, token: str) -> Caller | None:
        """The caller with a traffic token for this sandbox."""
        return await self._holder("traffic", sandbox_id, token)

    async def _holder(self, use: str, sandbox_id: str, token: str) -> Caller | None:
        match = _TOKEN.fullmatch(token)
        if match is None or not hmac.compare_digest(token, self._token(use, sandbox_id, match[1])):
            return None
        return await self._keys.caller_with(match[1]) if match[1] else OPERATOR

    async def signer(self, query: Mapping[str, str], operation: str, sandbox_id: str) -> tuple[str, Caller] | None:
        """(sandbox id, caller) of a signed file URL; None for a wrong or expired signature. sandbox_id: "" where the
        request names none: then one of the last used tokens has signed it."""
        signature = query.get("signature", "")
        if _SIGNATURE.fullmatch(signature) is None:
            return None
        expiration = query.get("signature_expiration", "")
        if expiration and not (expiration.isascii() and expiration.isdigit() and len(expiration) < 16):
            return None
        if expiration and int(expiration) < time.time():
            return None
        signed = f"{query.get('path', '')}:{operation}:{query.get('username', '')}:"
        tail = f":{expiration}" if expiration else ""
        for token, owner in reversed(self._issued.items()):
            if sandbox_id and owner != sandbox_id:
                continue
            digest = hashlib.sha256(f"{signed}{token}{tail}".encode("utf-8", "surrogatepass")).digest()
            made = f"v1_{base64.b64encode(digest).rstrip(b'=').decode()}"
            if hmac.compare_digest(made, signature):
                caller = await self.caller(owner, token)
                return None if caller is None else (owner, caller)
        return None

    def _note(self, token: str, sandbox_id: str) -> None:
        self._issued[token] = sandbox_id
        self._issued.move_to_end(token)
        while len(self._issued) > _ISSUED:
            self._issued.popitem(last=False)

    def _token(self, use: str, sandbox_id: str, key_id: str) -> str:
        mac = hmac.digest(self._secret, f"{use}\n{sandbox_id}\n{key_id}".encode(), "sha256")
        return f"rocksbx_{key_id}_{mac.hex()[:40]}"


