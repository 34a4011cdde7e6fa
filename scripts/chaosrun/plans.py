"""What each logical call is, and does to the service: drawn from the run's seed and the call's number.

The same seed gives the same calls; how they meet the kills is up to the machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import orjson
from benchmark.workloads import WORDS

MANY = (44, 80)  # texts of a call whose reply is too large for a record: 64 KiB are 43 vectors of 384 numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One logical call. It is tried until it succeeds, whatever else is done to it."""

    number: int
    workspace: int  # of two
    key: str | None  # Idempotency-Key
    body: bytes
    other_body: bytes
    sdk: bool  # its tries go through the OpenAI SDK
    hang_ups_s: tuple[float, ...]  # before that: tries whose connection is closed after so long
    loses_reply: bool  # the first success is broken off after its status line
    twins: int  # tries at the same time
    repeats: int  # after the success
    comes_back: bool  # repeated again when others were served meanwhile
    sends_other_body: bool
    has_namesake: bool  # the other workspace uses the same key for the same body


def plan(seed: int, number: int, model: str) -> Plan:
    chance = random.Random(f"{seed}:{number}")
    keyed = chance.random() < 0.9
    count = chance.randint(*MANY) if chance.random() < 0.03 else chance.randint(1, 4)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 12))) for _ in range(count)]
    format: Literal["float", "base64"] = "float" if chance.random() < 0.3 else "base64"
    return Plan(
        number=number,
        workspace=chance.randrange(2),
        key=f"chaos-{seed}-{number}" if keyed else None,
        body=orjson.dumps({"model": model, "input": texts, "encoding_format": format}),
        other_body=orjson.dumps({"model": model, "input": [*texts, "another"], "encoding_format": format}),
        sdk=keyed and chance.random() < 0.37,
        hang_ups_s=tuple(chance.uniform(0, 0.2) for _ in range(2) if chance.random() < 0.08),
        loses_reply=chance.random() < 0.05,
        twins=chance.randint(2, 4) if keyed and chance.random() < 0.06 else 1,
        repeats=chance.choice((1, 1, 2)) if keyed and chance.random() < 0.3 else 0,
        comes_back=keyed and chance.random() < 0.1,
        sends_other_body=keyed and chance.random() < 0.06,
        has_namesake=keyed and chance.random() < 0.05,
    )
