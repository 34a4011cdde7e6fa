"""What a model reads of each text: how many tokens there were, how many are kept, what the caller is told and billed.

One count, everywhere: after truncation, special tokens included. `encoders/tokenizer.py` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.core.packing import Packed, TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """Texts as token ids, cut to the model's context. found: int32 [texts], tokens before the cut."""

    packed: Packed
    found: TokenIds

    def usage(self) -> dict[str, Any]:
        """The `usage` block: `warnings` only if there are any."""
        tokens = self.packed.tokens
        usage: dict[str, Any] = {"prompt_tokens": tokens, "total_tokens": tokens}
        if warnings := self._warnings():
            usage["warnings"] = warnings
        return usage

    def counts(self) -> list[dict[str, Any]]:
        """Per text: the billable tokens, and whether it was cut."""
        pairs = zip(self.packed.lengths.tolist(), self.found.tolist(), strict=True)
        return [
            {"object": "token_count", "index": index, "tokens": kept, "truncated": found > kept}
            for index, (kept, found) in enumerate(pairs)
        ]

    def _warnings(self) -> list[dict[str, Any]]:
        cut = (self.found > self.packed.lengths).nonzero()[0].tolist()
        found, kept = self.found, self.packed.lengths
        return [
            {"code": "input_truncated", "index": index, "tokens": int(found[index]), "kept": int(kept[index])}
            for index in cut
        ]
