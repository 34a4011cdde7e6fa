"""Where usage events go. One port, a kind for each scheme; `relay.py` brings them the events, in order.

A sink takes a batch of one shard and says how many of it are safe. At least once: after a crash the same events come
again, with the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal, Protocol

from pydantic import ConfigDict, Field, SecretStr

from serve_app.core.ledger import Recorded
from serve_app.core.strict import StrictModel

MAX_BATCH = 500  # events that are brought to a sink at once, and so the most that come again after a crash


class SinkDown(Exception):
    """Nothing of the batch is safe, or nobody knows. Try again, after `retry_after_s` if the receiver said so."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SinkUnfit(Exception):
    """This sink cannot work as it is configured. The message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The receiver will never take this event. reason: one line, for a person."""

    recorded: Recorded
    reason: str


class SinkSettings(StrictModel):
    """One entry of `sinks` in the usage application's `args`."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a secret under a mistyped name

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    """Its cursor goes by this name: a sink that is renamed gets everything again."""
    url: Annotated[str, Field(repr=False)]
    """`jsonl:FOLDER`, or `https://...` of a webhook."""
    secret: SecretStr | None = None
    """Signs webhook calls: `whsec_...`, or `env:NAME` to read it from the environment of the usage actor. While it is
    being changed there may be several, with spaces between them: the call is signed with each."""
    mode: Literal["batch", "structured"] = "batch"
    """CloudEvents over HTTP: an array of events a call, or one event."""
    allow_private: bool = False
    """Allow a webhook at a private, loopback or link-local address, and plain http."""


class Sink(Protocol):
    async def deliver(self, shard: int, batch: Sequence[Recorded]) -> list[Refused]:
        """All of it is safe at the receiver when this returns, but for what it refuses for good. Raises SinkDown."""
        ...

    async def close(self) -> None: ...


def open_sink(settings: SinkSettings, *, source: str) -> Sink:
    """source: prefix of the CloudEvents `source`. Raises SinkUnfit."""
    scheme = settings.url.partition(":")[0]
    kinds = {"jsonl": "jsonl", "http": "http", "https": "http"}
    if scheme not in kinds:
        raise SinkUnfit(f"sink {settings.name}: a sink's url is jsonl:FOLDER or https://...")
    module = import_module(f"serve_app.sinks.{kinds[scheme]}")
    sink: Sink = module.open(settings, source=source)
    return sink
