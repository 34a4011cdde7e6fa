"""A model that does not say what it said when it was first loaded refuses to serve, and says why."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.catalog import ModelSpec
from serve_app.encoders import open_encoder, self_test
from tests.checkpoints import make_checkpoint, set_pooling


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "bert", "bert")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def started(model: Path, **settings: Any) -> None:
    """What a replica does before it is ready."""
    entry = {"id": "under-test", "name": "tests/under-test", "source": str(model), "class": "small", "unit_tokens": 64}
    kept = {"self_tests": str(model.parent / "kept"), "dtype": "float32", "threads": 1}
    spec = ModelSpec.model_validate({**entry, **kept, **settings})
    self_test.hold(spec, open_encoder(spec))


def record(model: Path) -> Path:
    return model.parent / "kept" / "under-test.json"


def test_the_same_files_pass_as_often_as_they_are_loaded(model: Path) -> None:
    started(model)
    kept = record(model).read_bytes()
    started(model)
    started(model, threads=2, replicas={"max": 3})
    assert record(model).read_bytes() == kept
    assert [path.name for path in record(model).parent.iterdir()] == [record(model).name]


def damage_one_weight(model: Path) -> None:
    """By its last bit: no vector tells."""
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def cut_off_the_end(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def change_the_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_the_pooling(model: Path) -> None:
    set_pooling(model, "cls", dimensions=64)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_one_weight, "reads weight files that are not those recorded"),
        (change_the_tokenizer, "makes other tokens of the same texts than were recorded"),
        (change_the_pooling, r"gives vectors with a cosine of -?0\.\d+ to those recorded"),
    ],
)
def test_what_is_not_the_model_that_was_recorded_is_refused(
    model: Path, damage: Callable[[Path], None], told: str
) -> None:
    started(model)
    kept = record(model).read_bytes()
    damage(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"model under-test failed its self-test: it {told}") as refused:
            started(model)
        assert f"remove {record(model)}" in str(refused.value)
    assert record(model).read_bytes() == kept
    record(model).unlink()
    started(model)


def test_a_weight_file_that_is_cut_off_is_refused(model: Path) -> None:
    started(model)
    cut_off_the_end(model)
    with pytest.raises(Exception, match=r"incomplete|deserializing"):
        started(model)


def test_other_arithmetic_is_refused_where_it_gives_other_vectors(model: Path) -> None:
    """Files and tokens are right, and a library or a device is not: nothing but the vectors tells."""
    started(model)
    kept = json.loads(record(model).read_text())
    kept["vectors"][1], kept["vectors"][2] = kept["vectors"][2], kept["vectors"][1]
    record(model).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"gives vectors with a cosine of -?0\.\d+ to those recorded"):
        started(model)


def test_a_machine_for_which_auto_means_another_dtype_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    started(model, dtype="auto")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="it computes in float32, recorded was bfloat16"):
        started(model, dtype="auto")


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"max_tokens": 64}, {"deterministic": True}])
def test_what_the_entry_says_is_the_operators_to_change(model: Path, change: dict[str, Any]) -> None:
    started(model)
    kept = record(model).read_bytes()
    started(model, **change)
    assert record(model).read_bytes() != kept
    started(model, **change)


def test_deterministic_means_the_recorded_bits(model: Path) -> None:
    started(model, deterministic=True)
    kept = json.loads(record(model).read_text())
    row = bytearray(base64.b64decode(kept["vectors"][2]))
    row[0] ^= 1  # the last bit of the first component
    kept["vectors"][2] = base64.b64encode(bytes(row)).decode()
    record(model).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="not the recorded ones to the bit"):
        started(model, deterministic=True)
    kept["entry"]["deterministic"] = False
    record(model).write_text(json.dumps(kept))
    started(model)


def test_of_replicas_that_start_at_once_the_first_record_stands(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(model)
    kept = record(model).read_bytes()
    read = self_test._read
    looks = iter([None])
    monkeypatch.setattr(self_test, "_read", lambda path: next(looks, read(path)))
    started(model)
    assert record(model).read_bytes() == kept
    looks = iter([None])
    change_the_pooling(model)
    with pytest.raises(ValueError, match="failed its self-test"):
        started(model)
    assert [path.name for path in record(model).parent.iterdir()] == [record(model).name]


def test_a_folder_without_hard_links_keeps_records_that_everybody_can_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr("serve_app.encoders.self_test.os.link", unknown)
    started(model)
    assert record(model).stat().st_mode & 0o777 == 0o644
    started(model)
    change_the_pooling(model)
    with pytest.raises(ValueError, match="failed its self-test"):
        started(model)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '"text"', "vectors"])
def test_a_record_that_cannot_be_read_is_named(model: Path, damaged: str) -> None:
    started(model)
    kept = json.loads(record(model).read_text()) | {"vectors": ["AAA"]}
    record(model).write_text(json.dumps(kept) if damaged == "vectors" else damaged)
    with pytest.raises(ValueError, match=r"under-test\.json is no record of a self-test"):
        started(model)


def test_null_keeps_nothing(model: Path) -> None:
    started(model, self_tests=None)
    change_the_pooling(model)
    started(model, self_tests=None)
    assert not record(model).exists()
