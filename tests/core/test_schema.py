from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.errors import (
    InvalidInput,
    InvalidJSON,
    MissingRequiredField,
    ServiceError,
    TooManyInputs,
    UnknownParameter,
    UnsupportedParameter,
)
from serve_app.core.schema import TOKEN_IDS_MESSAGE, EmbeddingsRequest, RerankRequest, TokenizeRequest, canonical, parse

quick = settings(max_examples=100, deadline=None)


def embeddings(body: bytes | dict[str, Any]) -> EmbeddingsRequest:
    return parse(EmbeddingsRequest, body if isinstance(body, bytes) else json.dumps(body).encode())


def error_of(body: bytes | dict[str, Any]) -> ServiceError | None:
    try:
        embeddings(body)
    except ServiceError as error:
        return error
    return None


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "bge-m3", "input": "a text", **fields}


def test_what_is_left_out_has_its_default() -> None:
    request = embeddings(asking())
    assert request.model_dump() == {
        "model": "bge-m3",
        "input": ("a text",),
        "encoding_format": "float",
        "dimensions": None,
        "user": None,
        "input_type": None,
    }


def test_every_field_is_taken_as_sent() -> None:
    fields = {"encoding_format": "base64", "dimensions": 256, "user": "u" * 256, "input_type": "document"}
    request = embeddings(asking(input=["b", "a"], **fields))
    assert request.model_dump() == {
        "model": "bge-m3",
        "input": ("b", "a"),
        "encoding_format": "base64",
        "dimensions": 256,
        "user": "u" * 256,
        "input_type": "document",
    }


def test_to_a_reply_that_is_kept_a_body_without_input_type_is_what_it_was_before_there_was_one() -> None:
    kept = b'{"dimensions":null,"encoding_format":"float","input":["a text"],"model":"bge-m3","user":null}'
    assert canonical(embeddings(asking())) == canonical(embeddings(asking(input_type=None))) == kept
    assert canonical(embeddings(asking(input_type="query"))) != kept


def test_to_a_reply_that_is_kept_a_body_to_rank_documents_says_what_is_not_its_default() -> None:
    asked: dict[str, Any] = {
        "model": "m",
        "query": "q",
        "documents": ["a", {"text": "b", "id": "1"}, {"text": "c", "id": None}],
    }
    kept = b'{"documents":[["a"],["b","1"],["c"]],"model":"m","query":"q"}'
    stated = {"texts": None, "top_n": None, "return_documents": False, "max_tokens_per_doc": None, "user": None}
    for body in (asked, asked | stated):
        assert canonical(parse(RerankRequest, json.dumps(body).encode())) == kept
    others: list[dict[str, Any]] = [
        {"top_n": 2.0},
        {"return_documents": True},
        {"user": "u"},
        {"max_tokens_per_doc": 9},
    ]
    texts = {name: value for name, value in asked.items() if name != "documents"} | {"texts": ["a", "b", "c"]}
    bodies = [asked, *(asked | other for other in others), texts]
    assert len({canonical(parse(RerankRequest, json.dumps(body).encode())) for body in bodies}) == len(bodies)
    assert canonical(parse(RerankRequest, json.dumps(texts).encode())).startswith(b'{"model":"m","query":"q","texts":')


def test_a_string_is_the_same_request_as_a_list_of_it() -> None:
    assert embeddings(asking(input="one")) == embeddings(asking(input=["one"]))


def test_null_is_the_same_request_as_absent() -> None:
    assert embeddings(asking(encoding_format=None, dimensions=None, user=None)) == embeddings(asking())


@quick
@given(st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text), min_size=1, max_size=8))
def test_texts_arrive_unchanged(texts: list[str]) -> None:
    assert embeddings(asking(input=texts)).input == tuple(texts)


INVALID_FIELDS: list[tuple[dict[str, Any], type[ServiceError], str | None]] = [
    ({}, MissingRequiredField, "model"),
    ({"input": "a"}, MissingRequiredField, "model"),
    ({"model": "m"}, MissingRequiredField, "input"),
    ({"model": "m", "inputs": "a"}, MissingRequiredField, "input"),
    (asking(model=None), InvalidInput, "model"),
    (asking(model=7), InvalidInput, "model"),
    (asking(model=["m"]), InvalidInput, "model"),
    (asking(input=None), InvalidInput, "input"),
    (asking(input=7), InvalidInput, "input"),
    (asking(input=True), InvalidInput, "input"),
    (asking(input={"text": "a"}), InvalidInput, "input"),
    (asking(input=""), InvalidInput, "input"),
    (asking(input=[]), InvalidInput, "input"),
    (asking(input="a\0b"), InvalidInput, "input"),
    (asking(input=["a", "b", "c", ""]), InvalidInput, "input[3]"),
    (asking(input=["a", None]), InvalidInput, "input[1]"),
    (asking(input=["a", 7]), InvalidInput, "input[1]"),
    (asking(input=["a", 1.5]), InvalidInput, "input[1]"),
    (asking(input=["a", True]), InvalidInput, "input[1]"),
    (asking(input=["a", ["b"]]), InvalidInput, "input[1]"),
    (asking(input=["a", [7]]), InvalidInput, "input[1]"),
    (asking(input=[7, "a"]), InvalidInput, "input[0]"),
    (asking(input=[True]), InvalidInput, "input[0]"),
    (asking(input=[[]]), InvalidInput, "input[0]"),
    (asking(input=[["a"]]), InvalidInput, "input[0]"),
    (asking(input=[[1, True]]), InvalidInput, "input[0]"),
    (asking(input=[{}]), InvalidInput, "input[0]"),
    (asking(input=["a", "b", "c\0"]), InvalidInput, "input[2]"),
    (asking(input="\ud800"), InvalidInput, "input"),
    (asking(input=["a", "b\udfff"]), InvalidInput, "input[1]"),
    (asking(input=[1, 2, 3]), UnsupportedParameter, "input"),
    (asking(input=[[1, 2], [3]]), UnsupportedParameter, "input"),
    (asking(input=[1] * 5000), UnsupportedParameter, "input"),
    (asking(encoding_format="float32"), UnsupportedParameter, "encoding_format"),
    (asking(encoding_format="Base64"), UnsupportedParameter, "encoding_format"),
    (asking(encoding_format=7), UnsupportedParameter, "encoding_format"),
    (asking(encoding_format=["float"]), UnsupportedParameter, "encoding_format"),
    (asking(dimensions=0), UnsupportedParameter, "dimensions"),
    (asking(dimensions=-1), UnsupportedParameter, "dimensions"),
    (asking(dimensions=256.0), UnsupportedParameter, "dimensions"),
    (asking(dimensions="256"), UnsupportedParameter, "dimensions"),
    (asking(dimensions=True), UnsupportedParameter, "dimensions"),
    (asking(dimensions=10**30), UnsupportedParameter, "dimensions"),
    (asking(dimensions=-(10**30)), UnsupportedParameter, "dimensions"),
    (asking(user="u" * 257), InvalidInput, "user"),
    (asking(user=7), InvalidInput, "user"),
    (asking(user={}), InvalidInput, "user"),
    (asking(truncate=True), UnknownParameter, "truncate"),
    (asking(Dimensions=256), UnknownParameter, "Dimensions"),
    (asking(**{"k" * 1000: 1}), UnknownParameter, None),
]


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [pytest.param(*row, id=f"{number}-{str(row[2])[:16]}") for number, row in enumerate(INVALID_FIELDS)],
)
def test_a_wrong_field_is_named(body: dict[str, Any], error: type[ServiceError], param: str | None) -> None:
    found = error_of(body)
    assert found is not None
    assert (type(found), found.param, found.status) == (error, param, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'"model"',
        b"[]",
        b"[1, 2]",
        b'{"model": "m", "input": "a"} {}',
        b"{'model': 'm', 'input': 'a'}",
        b'{"model": "m", "input": "a",}',
        b'{"model": "m", "input": "a", "dimensions": NaN}',
        b'{"model": "m", "input": "a\nb"}',
        b'{"model": "m", "input": "\xff"}',
        b'{"model": "\\ud800", "input": "a"}',
        b'{"model": "m", "input": "a", "dimensions": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "input": "a", "dimensions": 1e999}',
        '{"model": "m", "input": "a"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[-40:]),
)
def test_what_is_no_json_object_in_utf8_is_refused_as_a_whole(body: bytes) -> None:
    found = error_of(body)
    assert isinstance(found, InvalidJSON)
    assert found.param is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "input": "a", "input": "b"}',
        b'{"model": "m", "model": "m", "input": "a"}',
        b'{"model": "m", "input": "a", "user": "u", "dimensions": 1, "user": "v"}',
        b'{"model": "m", "input": "a", "\\u0069nput": "b"}',
        b'{"model": "m", "\\u0069nput": "a", "\\u0069nput": "b"}',
    ],
    ids=repr,
)
def test_a_key_that_stands_twice_is_refused_however_it_is_escaped(body: bytes) -> None:
    assert isinstance(error_of(body), InvalidJSON)


def test_an_unknown_field_is_named_before_a_doubled_one() -> None:
    """Each name costs one search of the whole body, so only the few known ones may be searched for."""
    assert isinstance(error_of(b'{"model": "m", "input": "a", "input": "b", "zzz": 1}'), UnknownParameter)


def test_a_text_may_say_what_a_key_says() -> None:
    assert embeddings(asking(model="input", input=["input", "model", '"input": "a"'], user="user")).model == "input"


@pytest.mark.parametrize("depth", [10, 500, 980, 1000, 1020, 1100, 100_000])
@pytest.mark.parametrize("field", ["user", "dimensions", "unheard_of"])
def test_deep_nesting_is_refused_like_any_other_wrong_value(field: str, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    for text in (b"a", b"input"):  # a text that says what a key says is looked at twice
        found = error_of(b'{"model": "m", "input": "%b", "%b": %b}' % (text, field.encode(), nested))
        assert isinstance(found, InvalidJSON) or (found is not None and found.param == field)


def test_the_unpaired_half_of_a_surrogate_pair_is_named_but_a_whole_pair_is_a_character() -> None:
    whole = rb'{"model": "m", "input": ["a", "\ud83d\ude00"]}'
    halves = rb'{"model": "m", "input": ["a", "\ud83d", "\ude00"]}'
    raw = b'{"model": "m", "input": ["a", "\xed\xa0\xbd"]}'
    assert embeddings(whole).input == ("a", "\N{GRINNING FACE}")
    for body in (halves, raw):
        found = error_of(body)
        assert isinstance(found, InvalidInput)
        assert found.param == "input[1]"


def test_integers_of_64_bits_are_integers() -> None:
    assert embeddings(asking(dimensions=2**64 - 1)).dimensions == 2**64 - 1


def test_token_ids_are_refused_with_the_setting_that_helps() -> None:
    found = error_of(asking(input=[[1, 2], [3]]))
    assert found is not None
    assert found.message == TOKEN_IDS_MESSAGE
    assert "check_embedding_ctx_length=False" in found.message


@pytest.mark.parametrize(
    ("field", "nearest"), [("dimension", "dimensions"), ("encodingformat", "encoding_format"), ("User", "user")]
)
def test_an_unknown_field_is_answered_with_the_nearest_known_one(field: str, nearest: str) -> None:
    found = error_of(asking(**{field: 1}))
    assert found is not None
    assert found.message == f"There is no parameter {field!r} here. Did you mean {nearest!r}?"


def test_an_unknown_field_like_no_other_gets_no_guess() -> None:
    found = error_of(asking(zzz=1))
    assert found is not None
    assert found.message == "There is no parameter 'zzz' here."


def test_more_texts_than_any_model_takes_are_left_for_the_model_to_count() -> None:
    assert len(embeddings(asking(input=["a"] * 3000)).input) == 3000
    assert len(embeddings(asking(input=["a"] * 3000 + [""])).input) == 3001


def test_a_number_behind_more_texts_than_any_model_takes_does_not_turn_the_array_into_a_wrong_type() -> None:
    found = error_of(asking(input=["a"] * 3000 + [7]))
    assert found is None or isinstance(found, TooManyInputs) or found.param == "input[3000]"


MANY_KEYS = b"".join(b',"k%d":1' % number for number in range(20_000))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model":"m","input":["a"%b]}' % (b",7" * 300_000), id="numbers"),
        pytest.param(b'{"model":"m","input":"a"%b}' % MANY_KEYS, id="keys"),
    ],
)
def test_a_body_of_nothing_but_mistakes_is_refused_at_once(body: bytes) -> None:
    """Everything in it is wrong, and the first mistake is enough: nothing is collected."""
    found = error_of(body)
    assert found is None or found.param == "k0"


def test_the_tokenize_request_knows_only_model_and_input() -> None:
    assert parse(TokenizeRequest, b'{"model": "m", "input": "a"}').input == ("a",)
    with pytest.raises(UnknownParameter, match="encoding_format"):
        parse(TokenizeRequest, b'{"model": "m", "input": "a", "encoding_format": "float"}')


def test_requests_are_values() -> None:
    request = embeddings(asking())
    with pytest.raises(ValueError, match="frozen"):
        request.model = "other"
    assert hash(request) == hash(embeddings(asking()))


MARK = "kumquat"
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
MARKED = st.builds(lambda before, after: f"{before}{MARK}{after}", ANY_TEXT, ANY_TEXT)
VALUES = st.one_of(
    MARKED,
    st.none() | st.integers() | st.booleans() | st.just(""),
    st.lists(MARKED | st.just("") | st.none() | st.integers() | st.lists(MARKED, max_size=2), max_size=4),
    st.dictionaries(MARKED, MARKED, max_size=2),
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": VALUES,
        "input": VALUES,
        "encoding_format": VALUES,
        "dimensions": VALUES,
        "user": VALUES | st.just(MARK * 100),
        "unheard_of": VALUES,
        f"no name {MARK}": VALUES,
        f"{MARK}\n": VALUES,
    },
)


@quick
@given(BODIES, st.sampled_from([0, 0, 1, 9]), st.booleans())
@example(asking(user=MARK * 100), 0, False)
@example(asking(input=[MARK, f"{MARK}\ud800"]), 0, False)
@example(asking(encoding_format=MARK), 0, True)
def test_no_message_repeats_what_a_caller_wrote(fields: dict[str, Any], missing_bytes: int, twice: bool) -> None:
    body = json.dumps(fields).encode()
    if twice:
        body = body[:-1] + b', "input": 1, "input": 2}'
    found = error_of(body[: len(body) - missing_bytes])
    if found is not None:
        assert MARK not in found.message
        assert MARK not in "".join(traceback.format_exception(found))


def test_a_field_that_looks_like_a_name_is_shown_and_any_other_is_not() -> None:
    named, odd = error_of(asking(instruction="x")), error_of(asking(**{"my card is 4111": "x"}))
    assert named is not None
    assert odd is not None
    assert "'instruction'" in named.message
    assert odd.message == "There is no parameter of that name here."
