"""API keys and the workspaces they belong to: how a key is made, recognised and kept.

A key's text is shown once, where it is made; what is stored is its SHA-256. `accounts.py` looks keys up.
"""

from __future__ import annotations

import hashlib
import hmac
import zlib
from dataclasses import dataclass
from enum import StrEnum

import orjson

PREFIX = "rp_live_"
SECRET_BYTES = 32
ENDPOINTS = ("/v1/embeddings", "/v1/rerank", "/v1/tokenize", "/v1/models", "/v1/usage")  # a key may be for some
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_CHARACTERS, _CHECKSUM_CHARACTERS = 43, 6  # base62 of 32 bytes, and of a CRC-32


class Plan(StrEnum):
    STARTER = "starter"
    PRO = "pro"
    TEAM = "team"
    ENTERPRISE = "enterprise"

    @property
    def has_keys(self) -> bool:
        return self is not Plan.STARTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Who pays. Replies, events and bills belong to a workspace, whichever of its keys asked."""

    id: str
    name: str
    plan: Plan
    created_ms: int
    monthly_cap_micros: int | None = None  # micro-dollars that it may spend in a calendar month, UTC

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Workspace:
        fields = orjson.loads(text)
        return cls(**fields | {"plan": Plan(fields["plan"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is stored: its digest, never its text. Times are Unix milliseconds."""

    id: str
    workspace: str
    name: str
    digest: str
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    models: tuple[str, ...] | None = None  # ids or canonical names, in any case; None: all
    endpoints: tuple[str, ...] | None = None  # of `ENDPOINTS`, with what lies below them; None: all
    requests_per_minute: int | None = None  # None: what the plan says
    tokens_per_minute: int | None = None  # None: what the plan says

    def valid_at(self, now_ms: int) -> bool:
        return (self.expires_ms is None or now_ms < self.expires_ms) and (
            self.revoked_ms is None or now_ms < self.revoked_ms
        )

    def may_call(self, route: str) -> bool:
        """Whether its endpoints include this path."""
        return self.endpoints is None or any(route == it or route.startswith(f"{it}/") for it in self.endpoints)

    def may_use(self, id: str, name: str) -> bool:
        """Whether its models include the one with this id and canonical name."""
        return self.models is None or not {id.lower(), name.lower()}.isdisjoint(it.lower() for it in self.models)

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> ApiKey:
        fields = orjson.loads(text)
        lists = {name: tuple(fields[name]) for name in ("models", "endpoints") if fields.get(name) is not None}
        return cls(**fields | lists)


def mint(secret: bytes) -> str:
    """The text of a new key from 32 random bytes: prefix, secret, checksum; a double click selects all of it."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a key is made of {SECRET_BYTES} random bytes, not {len(secret)}")
    body = _base62(int.from_bytes(secret), _SECRET_CHARACTERS)
    return PREFIX + body + _checksum(body)


def well_formed(text: str) -> bool:
    """Whether the checksum is right: what fails here was never a key, and no store needs to be asked."""
    body, checksum = text[len(PREFIX) : -_CHECKSUM_CHARACTERS], text[-_CHECKSUM_CHARACTERS:]
    return (
        text.isascii()
        and text.startswith(PREFIX)
        and len(body) == _SECRET_CHARACTERS
        and hmac.compare_digest(checksum, _checksum(body))
    )


def digest(text: str) -> str:
    """SHA-256, in hex. No slow hash: 256 random bits cannot be guessed, and a slow one would invite overload."""
    return hashlib.sha256(text.encode()).hexdigest()


def bearer(authorization: str | None) -> str | None:
    """The key in an `Authorization` header, if it holds one that is well formed."""
    scheme, _, text = (authorization or "").partition(" ")
    text = text.strip()
    return text if scheme.lower() == "bearer" and well_formed(text) else None


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM_CHARACTERS)


def _base62(number: int, width: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 62)
        digits = _ALPHABET[digit] + digits
    return digits.rjust(width, _ALPHABET[0])
