from __future__ import annotations

from base64 import b64decode
from typing import Any, Literal

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from serve_app.core.vectors import Vectors, cut, render

quick = settings(max_examples=60, deadline=None)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8))
ROWS = st_numpy.arrays(np.float32, SHAPES, elements=FINITE)
USAGE = {"prompt_tokens": 8, "total_tokens": 8}

Format = Literal["float", "base64"]


def rendered(vectors: Vectors, encoding_format: Format) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(
        render(vectors, model="BAAI/bge-m3", usage=USAGE, encoding_format=encoding_format)
    )
    return body


def bits(vectors: Vectors) -> list[int]:
    flat: list[int] = vectors.view(np.uint32).ravel().tolist()
    return flat


@quick
@given(ROWS)
def test_base64_decodes_to_the_same_bits(vectors: Vectors) -> None:
    rows = [np.frombuffer(b64decode(item["embedding"]), "<f4") for item in rendered(vectors, "base64")["data"]]
    assert bits(np.stack(rows).astype(np.float32)) == bits(vectors)


@quick
@given(ROWS)
def test_floats_parse_to_the_same_float32(vectors: Vectors) -> None:
    rows = [np.array(item["embedding"], np.float64) for item in rendered(vectors, "float")["data"]]
    assert bits(np.stack(rows).astype(np.float32)) == bits(vectors)


@quick
@given(ROWS, st.sampled_from(["float", "base64"]))
def test_the_same_rows_give_the_same_bytes(vectors: Vectors, encoding_format: Format) -> None:
    read_only = vectors.copy()
    read_only.setflags(write=False)
    first, again = (
        render(rows, model="m", usage=USAGE, encoding_format=encoding_format) for rows in (vectors, read_only)
    )
    assert first == again


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_the_reply_is_openais_with_the_rows_in_order(encoding_format: Format) -> None:
    body = rendered(np.eye(3, 2, dtype=np.float32), encoding_format)
    data = body.pop("data")
    assert body == {"object": "list", "model": "BAAI/bge-m3", "usage": USAGE}
    assert [(item["object"], item["index"]) for item in data] == [("embedding", 0), ("embedding", 1), ("embedding", 2)]
    assert all(item.keys() == {"object", "index", "embedding"} for item in data)


def test_base64_is_little_endian_float32() -> None:
    (item,) = rendered(np.array([[1.0, -2.0]], np.float32), "base64")["data"]
    assert b64decode(item["embedding"]) == bytes.fromhex("0000803f000000c0")


def test_warnings_travel_with_the_usage() -> None:
    usage = {**USAGE, "warnings": [{"code": "input_truncated", "index": 3, "tokens": 901, "kept": 512}]}
    body = render(np.ones((1, 1), np.float32), model="m", usage=usage, encoding_format="float")
    assert orjson.loads(body)["usage"] == usage


@quick
@given(
    st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(2, 16)),
        elements=st.floats(0.015625, 1, width=32) | st.floats(-1, -0.015625, width=32),
    ),
    st.data(),
)
def test_a_cut_vector_has_unit_length_and_its_old_direction(vectors: Vectors, data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, vectors.shape[1] - 1))
    short = cut(vectors, dimensions)

    assert short.dtype == np.float32
    assert short.shape == (len(vectors), dimensions)
    assert np.linalg.norm(short, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-6)
    kept = vectors[:, :dimensions]
    assert short * np.linalg.norm(kept, axis=1, keepdims=True) == pytest.approx(kept, rel=1e-5)


def test_the_native_size_is_not_touched() -> None:
    vectors = np.array([[0.6, 0.8]], np.float32)
    assert bits(cut(vectors, 2)) == bits(vectors)


def test_a_vector_whose_kept_part_is_zero_stays_finite() -> None:
    assert cut(np.array([[0, 0, 1]], np.float32), 2).tolist() == [[0, 0]]


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_a_cut_vector_can_be_rendered(encoding_format: Format) -> None:
    short = cut(np.array([[3, 4, 12], [4, 3, 12]], np.float32), 2)
    first, second = (item["embedding"] for item in rendered(short, encoding_format)["data"])
    if encoding_format == "base64":
        first, second = (np.frombuffer(b64decode(row), "<f4").tolist() for row in (first, second))
    assert first == pytest.approx([0.6, 0.8])
    assert second == pytest.approx([0.8, 0.6])
