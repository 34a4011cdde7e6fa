"""Texts to token ids with the model's own fast tokenizer: the one count that limits, `usage` and bills go by.

Blocking; it holds the GIL only to collect the ids. `deployments/model.py` runs it in threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from serve_app.core.errors import TooManyTokens
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.truncation import Tokenized


class Tokenizer:
    """Of a model that embeds."""

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
        ids = _flat((encoding.ids for encoding in encodings), int(lengths.sum()))
        return Tokenized(packed=Packed(ids=ids, lengths=lengths), found=found)


class PairTokenizer:
    """Of a model that ranks: a query and a document are one sequence, and the document is what is cut."""

    def __init__(self, tokenizer_json: str, max_tokens: int) -> None:
        """max_tokens: the model's context, query, document and special tokens together."""
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_tokens = max_tokens
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=True)

    def query(self, text: str, max_document_tokens: int | None = None) -> DocumentTokenizer:
        """For the documents of one query. Raises TooManyTokens if it leaves them no room."""
        query = self._tokenizer.encode(text, add_special_tokens=False)
        room = self._max_tokens - self._special - len(query)
        if room < 1:
            most = self._max_tokens - self._special - 1
            raise TooManyTokens(
                f"The query has {len(query):,} tokens; in this model's context a document has room beside {most:,}.",
                param="query",
            )
        return DocumentTokenizer(self._tokenizer, query, min(room, max_document_tokens or room))


class DocumentTokenizer:
    """One sequence for each document: the query comes first, and is tokenised once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, query: tokenizers.Encoding, room: int) -> None:
        """room: tokens of a document, of which the rest is cut."""
        self._tokenizer = tokenizer
        self._query = query
        self._room = room

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """Exactly the ids and types that a CrossEncoder would feed the model."""
        documents = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        cut_off = np.array([max(0, len(document) - self._room) for document in documents], np.int32)
        for document in documents:
            document.truncate(self._room)
        pairs = [self._tokenizer.post_process(self._query, document) for document in documents]
        lengths = np.array([len(pair) for pair in pairs], np.int32)
        firsts = np.array([len(pair) - sum(pair.type_ids) for pair in pairs], np.int32)
        ids = _flat((pair.ids for pair in pairs), int(lengths.sum()))
        return Tokenized(packed=Packed(ids=ids, lengths=lengths, firsts=firsts), found=lengths + cut_off)


def _flat(rows: Iterable[Sequence[int]], count: int) -> TokenIds:
    return np.fromiter((id for row in rows for id in row), np.int32, count=count)


def join(parts: Sequence[Tokenized]) -> Tokenized:
    """Pieces of one request, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    return Tokenized(
        packed=Packed.join([part.packed for part in parts]), found=np.concatenate([part.found for part in parts])
    )
