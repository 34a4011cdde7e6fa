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
        self._any = self._tokenizer.encode("a", add_special_tokens=False)
        self._any.truncate(1)

    def query(self, text: str, max_document_tokens: int | None = None) -> DocumentTokenizer:
        """For the documents of one query. Raises TooManyTokens if it leaves them no room."""
        query = self._tokenizer.encode(text, add_special_tokens=False)
        pair = self._tokenizer.post_process(query, self._any)
        room = self._max_tokens - (len(pair) - 1)
        if room < 1:
            raise TooManyTokens(
                f"The query has {len(query):,} tokens; of this model's {self._max_tokens:,} a document has room beside "
                f"{len(query) + room - 1:,}.",
                param="query",
            )
        return DocumentTokenizer(self._tokenizer, pair, min(room, max_document_tokens or room))


class DocumentTokenizer:
    """One sequence for each document: the query comes first, and is tokenised once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, pair: tokenizers.Encoding, room: int) -> None:
        """pair: the query with any document of one token. room: tokens of a document, of which the rest is cut."""
        self._tokenizer = tokenizer
        self._room = room
        at = pair.sequence_ids.index(1)
        self._before, self._behind = (np.array(ids, np.int32) for ids in (pair.ids[:at], pair.ids[at + 1 :]))
        self._typed = any(pair.type_ids)
        if self._typed and pair.type_ids != [0] * at + [1] * (len(pair) - at):
            raise ValueError("this tokenizer's types are not those of a first and a second text")

    @property
    def least_tokens(self) -> int:
        """Of each sequence, whatever its document: the query and the special tokens."""
        return len(self._before) + len(self._behind)

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """Exactly the ids and types that a CrossEncoder would feed the model."""
        documents = [it.ids for it in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        found = np.array([len(document) for document in documents], np.int32)
        kept = np.minimum(found, self._room)
        pieces = [
            piece
            for document in documents
            for piece in (self._before, np.array(document[: self._room], np.int32), self._behind)
        ]
        lengths = kept + np.int32(self.least_tokens)
        firsts = np.full_like(lengths, len(self._before)) if self._typed else lengths
        packed = Packed(ids=np.concatenate(pieces), lengths=lengths, firsts=firsts)
        return Tokenized(packed=packed, found=found + np.int32(self.least_tokens))


def _flat(rows: Iterable[Sequence[int]], count: int) -> TokenIds:
    return np.fromiter((id for row in rows for id in row), np.int32, count=count)


def join(parts: Sequence[Tokenized]) -> Tokenized:
    """Pieces of one request, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    return Tokenized(
        packed=Packed.join([part.packed for part in parts]), found=np.concatenate([part.found for part in parts])
    )
