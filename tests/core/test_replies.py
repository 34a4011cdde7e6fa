from __future__ import annotations

from typing import Any, Literal

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from serve_app.core.replies import Reply
from serve_app.core.vectors import Vectors

quick = settings(max_examples=60, deadline=None)

Format = Literal["float", "base64"]

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st_numpy.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=FINITE)
FORMATS = st.sampled_from(["float", "base64"])
WARNED = {
    "prompt_tokens": 512,
    "total_tokens": 512,
    "warnings": [{"code": "input_truncated", "index": 0, "tokens": 600, "kept": 512}],
}


def reply(
    vectors: Vectors,
    *,
    encoding_format: Format = "float",
    usage: dict[str, Any] | None = None,
    request_id: str = "req_1",
) -> Reply:
    return Reply(
        vectors=vectors,
        model="BAAI/bge-m3",
        usage=usage or {"prompt_tokens": 8, "total_tokens": 8},
        encoding_format=encoding_format,
        fingerprint="0123abcd",
        request_id=request_id,
    )


def some_rows(inputs: int, dimensions: int = 384) -> Vectors:
    return np.random.default_rng(7).standard_normal((inputs, dimensions), np.float32)


PACKED = reply(some_rows(3, 4)).pack()
HEAD, ROWS_OF_PACKED = PACKED.split(b"\n", 1)


def with_head(**changes: Any) -> bytes:
    return orjson.dumps(orjson.loads(HEAD) | changes) + b"\n" + ROWS_OF_PACKED


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("inputs", [1, 1024])
def test_a_kept_reply_is_rendered_to_the_same_bytes(encoding_format: Format, inputs: int) -> None:
    first = reply(some_rows(inputs), encoding_format=encoding_format)
    assert Reply.unpack(first.pack()).render() == first.render()


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_warnings_are_replayed_too(encoding_format: Format) -> None:
    first = reply(some_rows(1), encoding_format=encoding_format, usage=WARNED)
    again = Reply.unpack(first.pack()).render()
    assert again == first.render()
    assert orjson.loads(again)["usage"] == WARNED


@quick
@given(ROWS, FORMATS, st.text(max_size=20))
def test_nothing_is_lost_by_keeping_a_reply(vectors: Vectors, encoding_format: Format, request_id: str) -> None:
    first = reply(vectors, encoding_format=encoding_format, request_id=request_id)
    again = Reply.unpack(first.pack())
    assert again.render() == first.render()
    assert again.vectors.tobytes() == first.vectors.tobytes()
    assert again.vectors.dtype == np.float32
    assert (again.model, again.usage, again.encoding_format) == (first.model, first.usage, first.encoding_format)
    assert (again.fingerprint, again.request_id) == (first.fingerprint, first.request_id)
    assert again.pack() == first.pack()


def test_rows_may_hold_what_looks_like_the_end_of_a_line() -> None:
    newlines = np.frombuffer(b"\n" * 16, np.float32).reshape(1, 4)
    assert Reply.unpack(reply(newlines).pack()).vectors.tobytes() == b"\n" * 16


@pytest.mark.parametrize(("inputs", "encoding_format", "times"), [(1024, "float", 2), (1024, "base64", 1.3)])
def test_what_is_kept_is_much_less_than_what_is_sent(inputs: int, encoding_format: Format, times: float) -> None:
    first = reply(some_rows(inputs), encoding_format=encoding_format)
    assert len(first.pack()) * times < len(first.render())


@pytest.mark.parametrize("length", range(len(PACKED)))
def test_a_cut_reply_is_refused_wherever_it_was_cut(length: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        Reply.unpack(PACKED[:length])


def test_bytes_too_many_are_refused() -> None:
    for more in (b"\0", b"\n", bytes(4), bytes(16), PACKED):
        with pytest.raises(ValueError, match="cut short"):
            Reply.unpack(PACKED + more)


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]\n",
        b"5\n" + ROWS_OF_PACKED,
        b'"shape"\n' + ROWS_OF_PACKED,
        b"null\n" + ROWS_OF_PACKED,
        b"[" * 2000 + b"\n",
        b"\xff\xfe\n" + ROWS_OF_PACKED,
        b"SQLite format 3\0",
        with_head(shape=None),
        with_head(shape=12),
        with_head(shape=[12]),
        with_head(shape=[3, 4, 1]),
        with_head(shape=[3, "4"]),
        with_head(shape=[3.0, 4.0]),
        with_head(shape=[-3, -4]),
        with_head(shape=[0, 4]),
        with_head(shape=[2**62, 2**62]),
        with_head(another="field"),
        orjson.dumps({"shape": [3, 4]}) + b"\n" + ROWS_OF_PACKED,
    ],
    ids=range(21),
)
def test_foreign_bytes_are_refused(foreign: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Reply.unpack(foreign)


@quick
@given(st.binary(max_size=200))
def test_no_bytes_are_too_foreign_to_be_refused(foreign: bytes) -> None:
    for packed in (foreign, foreign + b"\n" + ROWS_OF_PACKED, b"{" + foreign + b"}\n"):
        with pytest.raises(ValueError, match=r"."):
            Reply.unpack(packed)
