"""Texts to token ids with the model's own fast tokenizer: the one count that limits, `usage` and bills go by.

Blocking; it holds the GIL only to collect the ids. `deployments/models.py` runs it in threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers

from serve_app.core.packing import Packed
from serve_app.core.truncation import Tokenized


class Tokenizer:
    def __init__(self, tokenizer_json: str, max_tokens: int) -> None:
        """max_tokens: the model's context, special tokens included. Longer texts are cut at the end of the text."""
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """Exactly the ids that sentence-transformers would feed the model."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        lengths = np.array([len(encoding) for encoding in encodings], np.int32)
        found = lengths.copy()
        for index, encoding in enumerate(encodings):
            for cut_off in encoding.overflowing:
                found[index] += len(cut_off) - self._special
        ids = np.fromiter((id for encoding in encodings for id in encoding.ids), np.int32, count=int(lengths.sum()))
        return Tokenized(packed=Packed(ids=ids, lengths=lengths), found=found)


def join(parts: Sequence[Tokenized]) -> Tokenized:
    """Pieces of one request, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    return Tokenized(
        packed=Packed.join([part.packed for part in parts]), found=np.concatenate([part.found for part in parts])
    )
