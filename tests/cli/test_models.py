"""What is listed, what is verified, and what is pulled from a hub that also lies, breaks off and is not there."""

from __future__ import annotations

import logging
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import orjson
import pytest
import yaml
from huggingface_hub import constants

from serve_app.core.catalog import ModelSpec
from serve_app.encoders import manifest, open_encoder
from serve_app.encoders.manifest import BUNDLED
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Run
from tests.cli.hub import COMMIT, FakeHub, served

OWN = Path(__file__).parents[2] / "deployments.yaml"
NAME = "tests/tiny"
WEIGHTS = b"weights " * 4096
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"hidden_size": 32}',
    "tokenizer.json": b"{}",
    "vocab.txt": b"a\nb\n",
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"word_embedding_dimension": 32}',
}
NOT_FETCHED = {
    "pytorch_model.bin": b"pickle",
    "rust_model.ot": b"other",
    "training_args.pt": b"pickle",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"other",
    "README.md": b"# Tiny",
    ".gitattributes": b"",
    "../outside.json": b"{}",
    "code.py": b"print()",
    "deep/er/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Asked instead of the real one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time", types.SimpleNamespace(sleep=lambda _: None))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with served(FakeHub(repositories={NAME: FILES | NOT_FETCHED})) as it:
        monkeypatch.setenv("HF_ENDPOINT", it.url)
        yield it
        huggingface_hub.close_session()


@pytest.fixture
def pull(run: Run, tmp_path: Path) -> Run:
    def command(*words: object) -> Any:
        return run("models", "pull", *words, "--to", tmp_path / "models")

    return command


def files_in(folder: Path) -> dict[str, bytes]:
    return {it.relative_to(folder).as_posix(): it.read_bytes() for it in folder.rglob("*") if it.is_file()}


def config_of(folder: Path, *entries: dict[str, Any]) -> Path:
    """A config with these models."""
    applications = [
        {
            "name": entry["id"],
            "route_prefix": None,
            "import_path": "serve_app.app:model",
            "args": {"name": f"tests/{entry['id']}", "class": "small", **entry},
        }
        for entry in entries
    ]
    path = folder / "deployments.yaml"
    path.write_text(yaml.safe_dump({"applications": applications}))
    return path


# Pull


def test_a_pulled_folder_is_what_the_hub_has_without_what_runs_code(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    result = pull(NAME)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "models" / NAME
    found = files_in(folder)
    kept = orjson.loads(found.pop("manifest.json"))
    assert found == FILES
    assert (kept["model"], kept["revision"]) == (NAME, COMMIT)
    assert {name: it["bytes"] for name, it in kept["files"].items()} == {name: len(FILES[name]) for name in FILES}
    assert kept["files"]["model.safetensors"]["sha256"] == manifest.digests(folder / "model.safetensors")[0]
    assert [it.name for it in folder.parent.iterdir()] == ["tiny"]  # no draft is left
    assert result.stdout.endswith(f'source: "{folder}"\n')
    assert not any("pytorch_model" in path or "onnx" in path for _, path, _ in hub.asked)


def test_a_pulled_folder_is_a_source_that_loads(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    hub.repositories[NAME] = files_in(make_checkpoint(tmp_path / "original", "bert"))
    told = orjson.loads(pull(f"{NAME}@{COMMIT}", "--json").stdout)
    entry = {"id": "tiny", "name": NAME, "class": "small", "source": told[0]["source"], "dtype": "float32"}
    assert open_encoder(ModelSpec.model_validate(entry | {"unit_tokens": 64})).card.native_dimensions == 64


def test_a_revision_is_what_is_asked_for_and_kept(hub: FakeHub, pull: Run) -> None:
    told = orjson.loads(pull(f"{NAME}@main", "--json").stdout)
    assert told[0]["revision"] == COMMIT
    downloads = [path for _, path, _ in hub.asked if "/resolve/" in path]
    assert len(downloads) == len(FILES)
    assert all(f"/resolve/{COMMIT}/" in path for path in downloads)  # a branch may move meanwhile


def test_an_id_of_the_config_is_its_source(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    config = config_of(tmp_path, {"id": "tiny", "source": f"hub:{NAME}@{COMMIT}"}, {"id": "own", "source": "/models"})
    assert pull("tiny", "--config", config).exit_code == 0
    refused = pull("own", "--config", config)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "not from the hub" in refused.stderr


def test_a_corrupted_file_is_thrown_away_and_fetched_anew(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    hub.corrupt = "model.safetensors"
    result = pull(NAME)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "model.safetensors is not what the hub says" in result.stderr
    assert not (tmp_path / "models" / NAME).exists()
    hub.corrupt = None
    assert pull(NAME).exit_code == 0
    assert (tmp_path / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS


def test_weights_that_lie_elsewhere_come_from_there_and_the_token_stays_here(
    hub: FakeHub, pull: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with served(FakeHub(repositories={NAME: FILES})) as other:
        hub.elsewhere = other.url
        assert pull(NAME).exit_code == 0
        assert set(hub.authorized) == {"Bearer hf_secret"}
        assert other.authorized == [None]
    assert (tmp_path / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS


def test_a_small_file_is_checked_by_what_git_calls_it(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    hub.corrupt = "tokenizer.json"
    result = pull(NAME)
    assert (result.exit_code, "tokenizer.json is not what" in result.stderr) == (2, True)
    assert not (tmp_path / "models" / NAME).exists()


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: FakeHub, pull: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut_after, hub.cuts = {"model.safetensors": 1000}, 1
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handle", said.append)
    monkeypatch.setattr(logging.getLogger("huggingface_hub.file_download"), "handle", said.append)
    assert pull(NAME).exit_code == 0  # the client itself goes on, and is quiet about it
    assert said == []
    ranges = [wanted for _, path, wanted in hub.asked if path.endswith("/model.safetensors")]
    assert ranges == [None, "bytes=1000-"]
    assert (tmp_path / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS


def test_a_pull_that_was_given_up_goes_on_where_it_stopped(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts = {"model.safetensors": 0}, 100
    draft = tmp_path / "models" / "tests" / ".tiny.part"
    result = pull(NAME)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "it goes on where it stopped" in result.stderr
    assert not (tmp_path / "models" / NAME).exists()
    (draft / "model.safetensors").write_bytes(WEIGHTS[:5000])  # as a kill leaves it
    hub.cuts = 0
    hub.asked.clear()
    assert pull(NAME).exit_code == 0
    assert [wanted for _, path, wanted in hub.asked if path.endswith("/model.safetensors")] == ["bytes=5000-"]
    assert (tmp_path / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS
    assert not draft.exists()


def test_a_draft_of_another_commit_is_not_mixed_in(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    draft = tmp_path / "models" / "tests" / ".tiny.part"
    draft.mkdir(parents=True)
    (draft / ".commit").write_text("f" * 40)
    (draft / "2_Dense.json").write_text("{}")
    assert pull(NAME).exit_code == 0
    assert files_in(tmp_path / "models" / NAME).keys() == FILES.keys() | {"manifest.json"}


def test_what_is_there_is_not_fetched_again_nor_replaced(hub: FakeHub, pull: Run, tmp_path: Path) -> None:
    pull(NAME)
    hub.asked.clear()
    assert pull(NAME).exit_code == 0
    assert not any("/resolve/" in path for _, path, _ in hub.asked)
    (tmp_path / "models" / NAME / "manifest.json").unlink()
    result = pull(NAME)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "move it away" in result.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": b"pickle", "config.json": b"{}"}, "a pickle"),
        (FILES | {"2_Dense/pytorch_model.bin": b"pickle", "2_Dense/config.json": b"{}"}, "2_Dense/pytorch_model.bin"),
        ({"config.json": b"{}"}, "no *.safetensors"),
    ],
)
def test_a_model_that_is_a_pickle_is_refused(
    hub: FakeHub, pull: Run, tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    hub.repositories[NAME] = files
    result = pull(NAME)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr
    assert not (tmp_path / "models").exists()
    assert not any("/resolve/" in path for _, path, _ in hub.asked)


def test_a_hub_that_is_not_there_is_one_line(hub: FakeHub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    result = pull(NAME)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "http://127.0.0.1:1 cannot be reached" in result.stderr
    assert "copy the folder" in result.stderr


@pytest.mark.parametrize(
    ("wanted", "wrong", "said"),
    [
        ("tests/none", {}, "There is no tests/none"),
        (f"{NAME}@{'f' * 40}", {}, "no such revision"),
        (NAME, {"gated": True}, "is gated"),
        (NAME, {"broken": True}, "answers 503"),
        ("a/b/c", {}, "no name of a model"),
        ("../x", {}, "no name of a model"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    hub: FakeHub, pull: Run, wanted: str, wrong: dict[str, bool], said: str
) -> None:
    for name, value in wrong.items():
        setattr(hub, name, value)
    result = pull(wanted)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr


def test_offline_is_obeyed(hub: FakeHub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = pull(NAME)
    assert (result.exit_code, result.stderr.count("\n"), hub.asked) == (2, 1, [])
    assert "HF_HUB_OFFLINE" in result.stderr


# List and verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model without a manifest."""
    for name, content in FILES.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "own"


def test_the_bundled_model_is_listed_and_right(run: Run) -> None:
    (row,) = orjson.loads(run("models", "list", "--json", "--config", OWN).stdout)
    assert (row["id"], row["dimensions"], row["present"]) == ("all-MiniLM-L6-v2", [384], True)
    assert row["bytes"] > 90_000_000
    result = run("models", "verify", "--json", "--config", OWN)
    (file,) = orjson.loads(result.stdout)["files"]
    assert (result.exit_code, file["verdict"], file["expected"]) == (0, "ok", BUNDLED_HASH)


BUNDLED_HASH = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_another_file_in_the_bundled_ones_place_is_found(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUNDLED, str(folder), {"model.safetensors": BUNDLED_HASH})
    result = run("models", "verify", "--config", config_of(tmp_path, {"id": "own", "source": str(folder)}))
    assert (result.exit_code, "differs" in result.stdout) == (1, True)


def test_a_list_tells_what_is_not_here(run: Run, folder: Path, tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        {"id": "own", "source": str(folder), "dimensions": [16, 8]},
        {"id": "gone", "source": "/no/such/folder"},
        {"id": "later", "source": f"hub:{NAME}@{COMMIT}"},
        {"id": "ranks", "source": "/no/such/reranker", "task": "rerank"},
    )
    result = run("models", "list", "--config", config, "--json")
    rows = {row["id"]: row for row in orjson.loads(result.stdout)}
    assert (rows["own"]["dimensions"], rows["own"]["folder"]) == ([32, 16, 8], str(folder))
    assert [rows[id]["present"] for id in ("own", "gone", "later")] == [True, False, False]
    assert "has not been downloaded" in rows["later"]["missing"]
    assert [rows[id]["task"] for id in ("own", "ranks")] == ["embed", "rerank"]
    assert "a score" in run("models", "list", "--config", config).stdout
    assert "/no/such/folder" in run("models", "list", "--config", config).stdout


def test_what_was_pulled_is_verified_file_by_file(hub: FakeHub, pull: Run, run: Run, tmp_path: Path) -> None:
    pull(NAME)
    folder = tmp_path / "models" / NAME
    words = ("models", "verify", "--config", config_of(tmp_path, {"id": "tiny", "source": str(folder)}), "--json")
    result = run(*words)
    verdicts = {it["file"]: it["verdict"] for it in orjson.loads(result.stdout)["files"]}
    assert (result.exit_code, verdicts) == (0, dict.fromkeys(sorted(FILES), "ok"))
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    (folder / "vocab.txt").unlink()
    (folder / "extra.safetensors").write_bytes(b"more")
    result = run(*words)
    verdicts = {it["file"]: it["verdict"] for it in orjson.loads(result.stdout)["files"] if it["verdict"] != "ok"}
    assert result.exit_code == 1
    assert verdicts == {"model.safetensors": "differs", "vocab.txt": "missing", "extra.safetensors": "unrecorded"}


def test_what_nobody_vouched_for_is_not_called_right(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("models", "verify", "--config", config_of(tmp_path, {"id": "own", "source": str(folder)}))
    assert (run(*words).exit_code, (folder / "manifest.json").exists()) == (1, False)
    assert run(*words, "--record").exit_code == 0
    assert run(*words).exit_code == 0
    (folder / "tokenizer.json").write_bytes(b"{ }")
    assert run(*words, "--record").exit_code == 1  # a manifest is never replaced


def test_the_hubs_cache_vouches_by_its_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "weights").write_bytes(WEIGHTS)
    sha256, _ = manifest.digests(tmp_path / "weights")
    shutil.move(tmp_path / "weights", blobs / sha256)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = ("models", "verify", "--config", config_of(tmp_path, {"id": "tiny", "source": f"hub:{NAME}@{COMMIT}"}))
    result = run(*words)
    assert (result.exit_code, " ok " in result.stdout) == (0, True)
    (blobs / sha256).write_bytes(WEIGHTS + b"!")
    assert run(*words).exit_code == 1


@pytest.mark.parametrize(
    ("words", "content", "code"),
    [
        (("list",), None, 2),
        (("list",), "applications: [", 2),
        (("list",), "models: []", 2),
        (("list",), "applications: [{name: m, import_path: 'serve_app.app:model', args: {id: m}}]", 2),
        (("verify", "other"), "applications: []", 2),
        (("pull", "other", "--to", "models"), "applications: []", 2),
    ],
)
def test_a_config_that_does_not_do_is_one_line(
    run: Run, tmp_path: Path, words: tuple[str, ...], content: str | None, code: int
) -> None:
    path = tmp_path / "deployments.yaml"
    if content is not None:
        path.write_text(content)
    result = run("models", *words, "--config", path)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)


def test_a_damaged_manifest_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text('{"files": 1}')
    result = run("models", "verify", "--config", config_of(tmp_path, {"id": "own", "source": str(folder)}), "--json")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert orjson.loads(result.stdout)["errors"] == ["model own: its manifest.json is damaged"]
