"""What an operator may write into `deployments.yaml` besides models: the `args` of the ingress and of the two actors.

Read once at start, but for the terms: they are Serve's `user_config`, and change while everything runs. `catalog.py`
holds the model entry; `store` must be the same for all three, the terms for two of them: a YAML anchor keeps them so.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from serve_app.core.plans import Limits
from serve_app.core.pricing import RateCard
from serve_app.core.strict import StrictModel

LogLevel = Literal["info", "warning", "error", "off"]

GIB = 2**30
_ORIGIN = re.compile(r"https?://([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?")
_DEFAULT_PORT = re.compile(r"http://.*:80|https://.*:443")


class StoreSettings(StrictModel):
    """What all three share."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a store's url may hold a password

    store: Annotated[str, Field(repr=False)] = ""
    """`sqlite:PATH` for one machine, `redis://HOST:PORT/DB` for several. Unset: SERVE_APP_STORE, or a file in data/."""
    blobs: str = ""
    """Folder for replies above 64 KiB, shared by all machines. Unset: beside the SQLite file, or data/blobs."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.1
    """What Ray reserves for each process. Fractional, so that everything fits on a laptop."""


class Terms(StrictModel):
    """What workspaces pay and may do: the `user_config` of the ingress and of the usage actor."""

    rates: RateCard = RateCard()
    """Prices: see `core/pricing.py`."""
    limits: Limits = Limits()
    """Requests and tokens per minute, and shares of turns: see `core/plans.py`."""


class IngressSettings(StoreSettings):
    """The `args` of the ingress application."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Ingress processes. Each tokenises and packs; one serves some hundred requests a second."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.2
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """A longer body is refused with 413 before it is read whole."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A request that takes longer is dropped and answered with 504."""
    max_pending_tokens: Annotated[int, Field(ge=1)] = 2_000_000
    """Tokens that may wait for one model in one ingress; beyond it requests get 503 `at_capacity`."""
    max_workspace_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    """Of them, what one workspace may have there."""
    load_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """What a request waits for a model that loads or sleeps, before it gets 503 `model_loading`."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 4096
    """Requests that one ingress works on at once."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that browsers may let call this service: `https://app.example.com`, exactly as a browser sends it."""
    patience_s: Annotated[float, Field(gt=0)] = 20.0
    """What a request waits for the store or an actor that is down, before it gets 503 `store_unavailable`."""
    duplicate_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """What a duplicate waits for the first call with its key, before it gets 409 `idempotency_in_progress`."""
    lease_s: Annotated[float, Field(ge=1)] = 15.0
    """An attempt that has not been heard of for so long is taken for dead: a retry takes over."""
    request_log: LogLevel = "info"
    """Which requests have a line in the log: all, those that fail, those of them that are our fault, or none."""
    replay_bytes: Annotated[int, Field(ge=0)] = 4 * GIB
    """Replies that one workspace may keep for replays, together."""
    replay_records: Annotated[int, Field(ge=0)] = 1_000_000
    """Idempotency keys that one workspace may use in 24 hours."""

    @field_validator("cors_origins")
    @classmethod
    def _exact_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """What no browser would send would silently allow nothing, and a pattern more than was meant."""
        for origin in origins:
            if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: scheme://host, or scheme://host:port if that is not the scheme's "
                    "own port, in lower case, without a path; `*` is not accepted"
                )
        return origins


class IdempotencySettings(StoreSettings):
    """The `args` of the idempotency application."""

    shards: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that keys are divided among."""
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 2**20
    """Replies that a process keeps in memory; the store has them all."""
    waiters_per_key: Annotated[int, Field(ge=0)] = 256
    """Duplicates that may wait for one call; more get 409 at once."""
    waiters: Annotated[int, Field(ge=0)] = 4096
    """Duplicates that may wait at one process."""
