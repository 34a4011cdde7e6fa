"""The base of everything an operator may write: immutable, and no key that it does not know.

A typo that is ignored is a setting that silently does nothing, so an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

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
