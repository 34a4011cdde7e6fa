from __future__ import annotations

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.packing import Packed
from serve_app.core.truncation import Tokenized

quick = settings(max_examples=60, deadline=None)


def tokenized(found: list[int], *, context: int) -> Tokenized:
    lengths = np.array([min(tokens, context) for tokens in found], np.int32)
    packed = Packed(ids=np.zeros(int(lengths.sum()), np.int32), lengths=lengths)
    return Tokenized(packed=packed, found=np.array(found, np.int32))


def test_texts_within_the_context_give_no_warnings() -> None:
    assert tokenized([3, 5], context=512).usage() == {"prompt_tokens": 8, "total_tokens": 8}


def test_a_cut_text_is_billed_for_what_was_kept_and_named_in_a_warning() -> None:
    assert tokenized([3, 5, 512, 901], context=512).usage() == {
        "prompt_tokens": 3 + 5 + 512 + 512,
        "total_tokens": 3 + 5 + 512 + 512,
        "warnings": [{"code": "input_truncated", "index": 3, "tokens": 901, "kept": 512}],
    }


def test_each_text_is_counted_as_it_would_be_billed() -> None:
    assert tokenized([3, 901], context=512).counts() == [
        {"object": "token_count", "index": 0, "tokens": 3, "truncated": False},
        {"object": "token_count", "index": 1, "tokens": 512, "truncated": True},
    ]


@quick
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=20), st.integers(1, 1000))
def test_usage_counts_and_warnings_agree(found: list[int], context: int) -> None:
    texts = tokenized(found, context=context)
    usage, counts = texts.usage(), texts.counts()

    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(count["tokens"] for count in counts)
    assert [count["index"] for count in counts] == list(range(len(found)))
    cut = [count["index"] for count in counts if count["truncated"]]
    assert [warning["index"] for warning in usage.get("warnings", [])] == cut
    assert ("warnings" in usage) == bool(cut)


def test_all_of_it_is_plain_json() -> None:
    texts = tokenized([3, 901], context=512)
    assert orjson.loads(orjson.dumps([texts.usage(), texts.counts()])) == [texts.usage(), texts.counts()]
