from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.core.catalog import (
    MOST_STRINGS,
    ModelCard,
    ModelSpec,
    SizeClass,
    Source,
    check_dimensions,
    check_strings,
    check_tokens,
    deployment_name,
    names_in,
)
from serve_app.core.errors import TooManyInputs, TooManyTokens, UnsupportedParameter
from serve_app.core.known import KNOWN, KnownModel, Task
from serve_app.core.prompts import Prompts

quick = settings(max_examples=200, deadline=None)

COMMIT = "0123456789abcdef" * 2 + "01234567"


def spec(**entry: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {"id": "bge-x", "name": "tests/bge-x", "source": "/models/bge-x", "class": "base", **entry}
    )


def card(size_class: SizeClass, *, native: int = 384, others: tuple[int, ...] = ()) -> ModelCard:
    return ModelCard(
        id="bge-m3",
        name="BAAI/bge-m3",
        size_class=size_class,
        native_dimensions=native,
        other_dimensions=others,
        max_tokens=512,
        unit_tokens=2048,
        dtype="float32",
        created=0,
        fingerprint="0123",
    )


LIMITS = [
    ("small", 2048, 262_144),
    ("base", 1024, 131_072),
    ("large", 1024, 131_072),
    ("7b", 256, 32_768),
]


@pytest.mark.parametrize(("name", "strings", "tokens"), LIMITS)
def test_each_class_takes_exactly_its_limits(name: str, strings: int, tokens: int) -> None:
    model = card(spec(**{"class": name}).size_class)

    check_strings(model, strings)
    with pytest.raises(TooManyInputs) as too_many_inputs:
        check_strings(model, strings + 1)
    check_tokens(model, tokens)
    with pytest.raises(TooManyTokens) as too_many_tokens:
        check_tokens(model, tokens + 1)

    for error, limit in ((too_many_inputs.value, strings), (too_many_tokens.value, tokens)):
        assert error.param == "input"
        for stated in (f"{limit + 1:,}", f"{limit:,}", "BAAI/bge-m3"):
            assert stated in error.message


def test_there_are_no_other_classes() -> None:
    assert [size_class.value for size_class in SizeClass] == [name for name, _, _ in LIMITS]
    assert max(strings for _, strings, _ in LIMITS) == MOST_STRINGS
    with pytest.raises(ValidationError, match="small"):
        spec(**{"class": "tiny"})


def test_the_native_size_is_what_nobody_has_to_ask_for() -> None:
    model = card(SizeClass.BASE, native=768, others=(256, 512))
    assert check_dimensions(model, None) == 768
    assert [check_dimensions(model, asked) for asked in (256, 512, 768)] == [256, 512, 768]


@pytest.mark.parametrize("asked", [0, 1, 255, 769, 10**30])
def test_a_size_that_the_model_does_not_have_is_answered_with_those_it_has(asked: int) -> None:
    with pytest.raises(UnsupportedParameter, match="it has: 256, 512, 768") as error:
        check_dimensions(card(SizeClass.BASE, native=768, others=(512, 256)), asked)
    assert error.value.param == "dimensions"


@pytest.mark.parametrize("native", [1, 384, 1024, 3584, 4096, 2**20])
def test_the_reply_to_a_unit_stays_within_two_mebibytes(native: int) -> None:
    sequences = card(SizeClass.BASE, native=native).unit_sequences
    assert sequences >= 1
    assert sequences == 1 or sequences * native * 4 <= 2**21 < (sequences + 1) * native * 4


@pytest.mark.parametrize(("units", "express"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4)])
def test_of_short_requests_fewer_units_are_computed_at_once(units: int, express: int) -> None:
    model = replace(card(SizeClass.BASE), units_at_once=units)
    assert (model.at_once(express=False), model.at_once(express=True)) == (units, express)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("package:a_package/weights", Source(kind="package", location="a_package/weights")),
        (f"hub:BAAI/bge-m3@{COMMIT}", Source(kind="hub", location="BAAI/bge-m3", revision=COMMIT)),
        ("/models/bge-m3", Source(kind="directory", location="/models/bge-m3")),
        ("./bge-m3", Source(kind="directory", location="./bge-m3")),
        ("../bge-m3", Source(kind="directory", location="../bge-m3")),
        ("~/bge-m3", Source(kind="directory", location="~/bge-m3")),
        ("/models/a:b@c", Source(kind="directory", location="/models/a:b@c")),
    ],
)
def test_a_source_is_a_package_a_pinned_repository_or_a_directory(text: str, source: Source) -> None:
    assert Source.parse(text) == source
    assert spec(source=text).source == text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("hub:BAAI/bge-m3", "40 hex digits"),
        ("hub:BAAI/bge-m3@main", "40 hex digits"),
        (f"hub:BAAI/bge-m3@{COMMIT[:-1]}", "40 hex digits"),
        (f"hub:BAAI/bge-m3@{COMMIT}0", "40 hex digits"),
        (f"hub:BAAI/bge-m3@{COMMIT.upper()}", "40 hex digits"),
        (f"hub:BAAI/bge-m3@{COMMIT}\n", "40 hex digits"),
        (f"hub:@{COMMIT}", "40 hex digits"),
        ("package:", "is none of"),
        ("BAAI/bge-m3", "is none of"),
        ("https://models.example/BAAI/bge-m3", "is none of"),
        ("", "is none of"),
    ],
)
def test_any_other_source_is_refused_with_what_would_be_right(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Source.parse(text)
    with pytest.raises(ValidationError, match=advice):
        spec(source=text)


def test_an_entry_needs_only_id_name_source_and_class() -> None:
    entry = spec()
    assert (entry.dtype, entry.device, entry.resolved_device) == ("auto", "auto", "cpu")
    assert (entry.replicas.min, entry.replicas.max) == (1, 1)
    assert not entry.trust_remote_code


@pytest.mark.parametrize("missing", ["id", "name", "source", "class"])
def test_an_entry_without_one_of_these_is_refused(missing: str) -> None:
    entry = spec().model_dump(by_alias=True)
    del entry[missing]
    with pytest.raises(ValidationError, match="Field required") as error:
        ModelSpec.model_validate(entry)
    assert [problem["loc"] for problem in error.value.errors()] == [(missing,)]


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"id": "BAAI/bge-m3"}, "id"),
        ({"id": "bge--m3"}, "id"),
        ({"id": "bge:m3"}, "id"),
        ({"id": "-bge"}, "id"),
        ({"id": "bge-"}, "id"),
        ({"id": ""}, "id"),
        ({"id": "b" * 65}, "id"),
        ({"id": "bge-m3\n"}, "id"),
        ({"name": "BAAI/bge/m3"}, "name"),
        ({"name": "BAAI/"}, "name"),
        ({"name": "BAAI--bge"}, "name"),
        ({"name": "BAAI:bge"}, "name"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"max_tokens": 7}, "max_tokens"),
        ({"dimensions": [0]}, "dimensions"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"max_replicas_per_node": 0}, "max_replicas_per_node"),
        ({"max_replicas_per_node": 101}, "max_replicas_per_node"),
        ({"max_replicas_per_node": 1.5}, "max_replicas_per_node"),
        ({"unit_tokens": 63}, "unit_tokens"),
        ({"replicas": {"min": -1}}, "replicas.min"),
        ({"replicas": {"max": 0}}, "replicas.max"),
        ({"replicas": {"min": 3, "max": 2}}, "replicas"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_path(entry: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**entry)
    steps = field.count(".") + 1  # a tuple's item has one more: its index
    assert {".".join(map(str, problem["loc"][:steps])) for problem in error.value.errors()} == {field}


def test_the_device_follows_the_reserved_gpu() -> None:
    assert spec(num_gpus=0.5).resolved_device == "cuda"
    assert spec(num_gpus=1, device="cpu").resolved_device == "cpu"
    assert spec(num_gpus=1, device="cuda").resolved_device == "cuda"
    with pytest.raises(ValidationError, match="num_gpus is 0"):
        spec(device="cuda")


@pytest.mark.parametrize(
    ("entry", "path", "key", "nearest"),
    [
        ({"dimension": [256]}, "", "dimension", "dimensions"),
        ({"Threads": 2}, "", "Threads", "threads"),
        ({"size_class": "base"}, "", "size_class", "class"),
        ({"replicas": {"mxa": 2}}, "replicas", "mxa", "max"),
        ({"replicas": {"target_bus": 1}}, "replicas", "target_bus", "target_busy"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(
    entry: dict[str, Any], path: str, key: str, nearest: str
) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**entry)
    (problem,) = error.value.errors()
    assert ".".join(map(str, problem["loc"])) == path
    assert f"unknown key {key!r}; did you mean {nearest!r}?" in problem["msg"]


def test_an_unknown_key_like_no_other_is_answered_with_all_known_ones() -> None:
    with pytest.raises(ValidationError, match="unknown key 'zzz'; known keys: min, max, target_busy"):
        spec(replicas={"zzz": 2})


LEGAL_NAMES = ["BAAI/bge-y", "all-MiniLM-L6-v2", "Alibaba-NLP/gte_Qwen2-7B.v1"]


@pytest.mark.parametrize("name", LEGAL_NAMES)
def test_the_names_on_the_hub_are_legal_and_survive_in_the_deployment_name(name: str) -> None:
    assert names_in(deployment_name(spec(name=name))) == ("bge-x", name)


@quick
@given(st.text("aZ0._-/:", min_size=1, max_size=7), st.text("aZ0._-/:", min_size=1, max_size=9))
def test_whatever_an_entry_may_be_called_survives_in_the_deployment_name(id: str, name: str) -> None:
    for entry in ({"id": id}, {"name": name}, {"id": id, "name": name}):
        try:
            legal = spec(**entry)
        except ValidationError:
            continue
        assert names_in(deployment_name(legal)) == (legal.id, legal.name)


SEGMENT = st.lists(st.text("aZ09._", min_size=1, max_size=4), min_size=1, max_size=3).map("-".join)


@quick
@given(SEGMENT.map(lambda segment: f"m{segment}"), SEGMENT, st.none() | SEGMENT)
def test_names_of_words_digits_dots_and_hyphens_are_legal(id: str, owner: str, model: str | None) -> None:
    name = owner if model is None else f"{owner}/{model}"
    assert names_in(deployment_name(spec(id=id, name=name))) == (id, name)


@pytest.mark.parametrize("other", ["ingress", "encoder", "encoder:bge-m3", "reranker:a:b", "encoder:a:b:c", "", "::"])
def test_any_other_deployment_has_no_names(other: str) -> None:
    assert names_in(other) is None


# Models that are known by name


@pytest.mark.parametrize("model", KNOWN.values(), ids=lambda model: model.id)
def test_of_a_known_model_an_entry_says_where_it_lies_and_no_more(model: KnownModel) -> None:
    for short in (model.id, model.id.upper(), model.name.rpartition("/")[2]):
        entry = ModelSpec.model_validate({"id": short, "source": "/models/it"})
        assert (entry.id, entry.name, entry.size_class) == (short, model.name, model.size_class)
        assert (entry.native_dimensions, entry.dimensions) == (model.dimensions, model.matryoshka)
        assert (entry.pooling, entry.task) == (model.pooling, model.task)
    named = ModelSpec.model_validate({"id": "mine", "name": model.name, "source": "/models/it"})
    assert (named.id, named.name, named.size_class) == ("mine", model.name, model.size_class)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("class", "small", "BAAI/bge-m3 has class large, the entry says small"),
        ("native_dimensions", 768, "BAAI/bge-m3 has native_dimensions 1024, the entry says 768"),
        ("pooling", "mean", "BAAI/bge-m3 has pooling cls, the entry says mean"),
        ("task", "rerank", "BAAI/bge-m3 has task embed, the entry says rerank"),
    ],
)
def test_an_entry_that_contradicts_what_is_known_is_refused_with_both_values(key: str, value: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ModelSpec.model_validate({"id": "bge-m3", "source": "/models/it", key: value})


def test_what_an_entry_may_choose_it_chooses() -> None:
    entry = {
        "id": "nomic-embed-text-v1.5",
        "source": "/models/it",
        "dimensions": [256],
        "max_tokens": 512,
        "pooling": None,
    }
    chosen = ModelSpec.model_validate(entry)
    assert (chosen.dimensions, chosen.max_tokens, chosen.pooling) == ((256,), 512, "mean")


def test_an_entry_under_a_known_id_and_another_name_is_another_model() -> None:
    other = ModelSpec.model_validate({"id": "bge-m3", "name": "acme/bge-m3", "source": "/models/it", "class": "base"})
    assert (other.name, other.size_class, other.pooling) == ("acme/bge-m3", "base", None)


@pytest.mark.parametrize("odd", [5, None, ["bge-m3"], {"a": 1}])
@pytest.mark.parametrize("key", ["id", "name", "class", "pooling", "native_dimensions", "prompts", "task"])
def test_odd_values_are_refused_as_what_they_are(key: str, odd: Any) -> None:
    entry = {"id": "bge-m3", "name": "BAAI/bge-m3", "source": "/models/it", key: odd}
    if odd is None and key != "id":  # null says nothing
        assert ModelSpec.model_validate(entry).size_class == "large"
        return
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(entry)


def test_an_entry_of_an_unknown_model_says_its_name_and_class() -> None:
    with pytest.raises(ValidationError) as refused:
        ModelSpec.model_validate({"id": "acme-embed", "source": "/models/it"})
    assert {error["loc"][0] for error in refused.value.errors()} == {"name", "class"}


def test_sizes_of_a_known_model_are_smaller_than_its_own_and_names_are_told_apart() -> None:
    assert all(size < model.dimensions for model in KNOWN.values() for size in model.matryoshka)
    assert len({model.id.lower() for model in KNOWN.values()}) == len(KNOWN)


@pytest.mark.parametrize(
    "setting", [{"dimensions": [8]}, {"prompts": {"query": "q: "}}, {"pooling": "cls"}, {"cache_bytes": 1}]
)
def test_a_reranker_has_nothing_that_is_for_vectors(setting: dict[str, Any]) -> None:
    assert spec(task="rerank").task is Task.RERANK
    with pytest.raises(ValidationError, match=f"task is rerank: {next(iter(setting))} is for models that embed"):
        spec(task="rerank", **setting)
    with pytest.raises(ValidationError, match="max_tokens is 63: a query and a document need 64 together"):
        spec(task="rerank", max_tokens=63)
    assert spec(**setting).task is Task.EMBED


# Prompts


def test_prompts_are_what_the_entry_writes_out_or_what_is_recommended() -> None:
    written = spec(prompts={"query": "find: "}).prompts
    assert written == Prompts(query="find: ", document=None)
    e5 = ModelSpec.model_validate({"id": "e5-large-v2", "source": "/models/it", "prompts": "recommended"})
    assert e5.prompts == Prompts(query="query: ", document="passage: ")
    for entry in ({"id": "e5-large-v2", "source": "/models/it"}, {"id": "bge-m3", "source": "/models/it"}):
        assert ModelSpec.model_validate(entry).prompts is None


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("recommended", "no prompts are known to be recommended"),
        ({"question": "?"}, "unknown key 'question'"),
        ({}, "prompts say nothing"),
        ({"query": ""}, "at least 1 character"),
        ({"query": "x" * 2_049}, "at most 2048 characters"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompts: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        spec(prompts=prompts)
    if prompts == "recommended":
        with pytest.raises(ValidationError, match=told):
            ModelSpec.model_validate({"id": "bge-m3", "source": "/models/it", "prompts": prompts})
