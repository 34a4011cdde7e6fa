"""What is put before a text so that a model knows a question from a passage: only where an entry and a request say so.

A request says it with `input_type`, or with the suffix `-query` or `-passage` of the model's name, for clients that
send no fields of their own. A prompt is part of the text: counted, cut and billed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from serve_app.core.errors import UnsupportedParameter
from serve_app.core.strict import StrictModel

InputType = Literal["query", "document"]
SUFFIXES: dict[str, InputType] = {"-query": "query", "-passage": "document"}

Prompt = Annotated[str, Field(min_length=1, max_length=2_048)]


class Prompts(StrictModel):
    """What goes before a text, space at its end included. Unset = nothing does."""

    query: Prompt | None = None
    document: Prompt | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Prompts:
        if self.query is None and self.document is None:
            raise ValueError("prompts say nothing: write out query, document or both")
        return self


def parted(name: str) -> tuple[str, InputType] | None:
    """`bge-m3-query` -> (`bge-m3`, query). None for a name without such a suffix."""
    for suffix, input_type in SUFFIXES.items():
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], input_type
    return None


def prompt_for(
    prompts: Prompts | None, *, by_name: InputType | None, by_field: InputType | None, model: str
) -> str | None:
    """What goes before each text, if anything. Raises UnsupportedParameter where that cannot be."""
    if by_name and by_field and by_name != by_field:
        message = f"The model's name asks for {by_name}, input_type for {by_field}."
        raise UnsupportedParameter(message, param="input_type")
    asked = by_name or by_field
    if asked is None:
        return None
    if prompts is None:
        message = f"{model} has no prompts here: queries and documents are alike to it. Leave input_type out."
        raise UnsupportedParameter(message, param="input_type")
    return prompts.query if asked == "query" else prompts.document


def prompted(texts: Sequence[str], prompt: str | None) -> Sequence[str]:
    """The texts that the model reads."""
    return texts if prompt is None else [prompt + text for text in texts]
