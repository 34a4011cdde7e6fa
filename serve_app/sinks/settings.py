"""The `args` of the usage application: where events go, and how long they are kept.

Apart from `core/settings.py`, because it holds the sinks' entries.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from serve_app.core.settings import StoreSettings
from serve_app.sinks import SinkSettings


class UsageSettings(StoreSettings):
    """The `args` of the usage application."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a sink's secret under a mistyped name

    sinks: tuple[SinkSettings, ...] = ()
    """Where events go; each sink has a cursor of its own."""
    source: Annotated[str, Field(min_length=1)] = "/serve-app"
    """CloudEvents `source`, before the shard's number: tell two installations apart by it."""
    keep_days: Annotated[float, Field(ge=2)] = 35.0
    """Delivered events stay in the store for so long."""
    meter_s: Annotated[float, Field(gt=0)] = 10.0
    """How often it is looked whether reserved models are there."""
