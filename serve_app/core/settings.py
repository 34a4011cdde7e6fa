"""What an operator may write into `deployments.yaml`: strict models, read once at start.

An unknown key is refused with its path and the nearest known one, because a typo that is ignored is a setting that
silently does nothing. `catalog.py` holds the model entry, this module the base of both and the ingress's settings.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.core.errors import nearest


class StrictModel(BaseModel):
    """A piece of configuration: immutable, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                guess = nearest(str(key), known)
                hint = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return values


class Scaling(StrictModel):
    """How many replicas a group may have. Serve adds one when the mean of `target_units` per replica is exceeded."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    target_units: Annotated[float, Field(gt=0)] = 1.5  # an ingress with work to do keeps two units at each replica
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class IngressSettings(StrictModel):
    """The `args` of the ingress application."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Ingress processes. Each tokenises and packs; one serves some hundred requests a second."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.2
    """What Ray reserves for each. Fractional, so that everything fits on a laptop."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """A longer body is refused with 413 before it is read whole."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A request that takes longer is dropped and answered with 504."""
    max_pending_tokens: Annotated[int, Field(ge=1)] = 2_000_000
    """Tokens that may wait for one model in one ingress; beyond it requests get 503 `at_capacity`."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 4096
    """Requests that one ingress works on at once."""
