"""What the clients did and saw: the side of the story that the service had no hand in."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import orjson

from chaosrun.wire import Answer

SHOWN = 5  # faults of a kind that are told one by one


@dataclass(slots=True, kw_only=True)
class Logical:
    """A key of a workspace, as its user saw it."""

    name: str  # what its request ids begin with
    workspace: str
    first_ns: int | None = None  # when the first success was seen; None: there was none
    digest: bytes | None = None  # of the first body that was read
    tokens: int = 0

    def succeed(self, answer: Answer) -> None:
        self.first_ns = min(answer.seen_ns, self.first_ns or answer.seen_ns)

    def keep(self, body: bytes) -> bool:
        """False: another body than before."""
        digest = hashlib.sha256(body).digest()
        if self.digest is None:
            self.digest, self.tokens = digest, tokens_of(body)
        return self.digest == digest


@dataclass(slots=True)
class History:
    keyed: dict[str, Logical] = field(default_factory=dict)  # by claim
    unkeyed: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    """By request id of a success: workspace, and tokens if the body was read."""
    begun: int = 0
    finished: int = 0
    tries: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    """When successes were seen, on the monotonic clock."""
    gave_up_s: list[float] = field(default_factory=list)
    """When the SDK raised an error after all its retries."""

    def fault(self, kind: str, what: str) -> None:
        self.faults[kind] += 1
        if self.faults[kind] <= SHOWN:
            self.shown.append(f"{kind}: {what}")


def tokens_of(body: bytes) -> int:
    return int(orjson.loads(body)["usage"]["total_tokens"])
