"""The Serve configs of deploy/, through Serve's own parser and the service's own settings."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve_app import app
from serve_app.cli import checks, config
from serve_app.cli.checks import Level
from serve_app.cli.config import BUILDERS
from serve_app.core.catalog import ModelSpec, Source
from serve_app.core.known import KNOWN, Task
from serve_app.core.settings import IdempotencySettings, IngressSettings
from serve_app.deployments import tracing
from tests.deploy.manifests import DEPLOY, PRODUCTION, ROOT

CONFIGS = [ROOT / "deployments.yaml", DEPLOY / "gpu.yaml", DEPLOY / "one-gpu.yaml", PRODUCTION]
GPU_BYTES = 24 * 2**30  # of the smallest GPU that the file is for
BREAKS = [
    ("shards: 2", "shard: 2"),
    ("replicas: {min: 1, max: 4}", "replicas: {min: 5, max: 4}"),
    ("id: bge-m3\n", "id: bge--m3\n"),
    ("dtype: bfloat16", "dtype: int8"),
    ("max_replicas_per_node: 1", "max_replicas_per_node: 0"),
    ("source: /models/BAAI/bge-m3\n", "source: hub:BAAI/bge-m3\n"),
    ("id: gte-large\n", "id: bge-large-en-v1.5\n"),
    ("import_path: serve_app.app:usage", "import_path: serve_app.app:ingress"),
]


def models() -> list[ModelSpec]:
    return config.read(PRODUCTION).models


def is_right(path: Path) -> bool:
    found = config.read(path)
    return not found.foreign and [it.level for it in checks.config(found)] == [Level.OK]


def serve_takes(content: dict[str, Any]) -> bool:
    """Raises ValidationError. False: it dropped a key that it does not know, as it does without a word."""
    kept = ServeDeploySchema.model_validate(content).model_dump(exclude_unset=True)
    parts = [(content, kept), (content["http_options"], kept["http_options"])]
    parts += zip(content["applications"], kept["applications"], strict=True)
    return all(written.keys() == read.keys() for written, read in parts)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_and_the_service_take_every_config(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert serve_takes(content)
    assert is_right(path)
    for application in content["applications"]:
        name = application["import_path"]
        getattr(app, name.partition(":")[2])(BUILDERS[name].model_validate(application["args"]))


@pytest.mark.parametrize("path", [ROOT / "deployments.yaml", PRODUCTION], ids=lambda path: path.name)
def test_tracing_is_off_until_its_comment_is_taken_away(path: Path) -> None:
    text = path.read_text()
    assert "tracing_config" not in yaml.safe_load(text)
    block = re.search(r"^# tracing_config:.*\n(?:#   .*\n)+", text, re.MULTILINE)
    assert block
    content = yaml.safe_load(text.replace(block[0], re.sub("^# ", "", block[0], flags=re.MULTILINE)))
    assert serve_takes(content)
    assert content["tracing_config"] == {
        "enabled": True,
        "exporter_import_path": f"{tracing.__name__}:{tracing.otlp.__name__}",
        "sampling_ratio": 0.01,
    }
    assert not inspect.signature(tracing.otlp).parameters  # Serve calls it without any


@pytest.mark.parametrize(("right", "wrong"), BREAKS)
def test_a_slip_in_an_entry_would_be_found(right: str, wrong: str, tmp_path: Path) -> None:
    text = PRODUCTION.read_text()
    assert right in text
    broken = tmp_path / "production.yaml"
    broken.write_text(text.replace(right, wrong, 1))
    assert not is_right(broken)


@pytest.mark.parametrize("key", ["route_prefix", "proxy_location", "http_options", "port", "args"])
def test_a_key_that_serve_does_not_know_would_be_found(key: str) -> None:
    broken = yaml.safe_load(PRODUCTION.read_text().replace(f"{key}:", f"{key}s:", 1))
    with pytest.raises((ValidationError, KeyError, AssertionError)):
        assert serve_takes(broken)


def test_two_applications_of_one_name_would_be_found() -> None:
    with pytest.raises(ValidationError, match="bge-m3"):
        serve_takes(yaml.safe_load(PRODUCTION.read_text().replace("name: gte-large", "name: bge-m3", 1)))


def test_every_known_model_has_one_entry_and_there_is_no_other() -> None:
    assert Counter(it.name.lower() for it in models()) == Counter(KNOWN.keys())


def test_no_node_downloads_and_a_folder_is_where_models_pull_puts_it() -> None:
    for it in models():
        kind = Source.parse(it.source).kind
        assert kind == "package" if it.id == "all-MiniLM-L6-v2" else it.source == f"/models/{it.name}"


def test_the_store_comes_from_the_environment_and_no_password_is_in_the_file() -> None:
    assert [it.store for it in config.read(PRODUCTION).services] == ["", "", ""]
    assert "redis:" not in PRODUCTION.read_text()


def test_several_processes_answer_and_several_keep_the_keys() -> None:
    found = config.read(PRODUCTION)
    assert all(it.replicas > 1 for it in found.services if isinstance(it, IngressSettings))
    assert all(it.shards > 1 for it in found.services if isinstance(it, IdempotencySettings))
    assert found.host == "0.0.0.0"


def test_on_a_gpu_go_only_those_that_reserve_a_share_of_it_and_no_model_shares_one_with_itself() -> None:
    for it in models():
        assert it.dtype != "auto"  # nodes may differ, vectors may not
        assert (it.num_cpus == 0) == (it.num_gpus > 0)
        assert (it.max_replicas_per_node == 1) == (0 < it.num_gpus < 1)
    assert all(it.num_cpus > 0 for it in config.read(PRODUCTION).services)


def test_weights_leave_their_share_of_a_gpu_a_third_for_the_rest() -> None:
    for it in models():
        if it.num_gpus:
            assert KNOWN[it.name.lower()].parameters * 10**6 * 2 < it.num_gpus * GPU_BYTES * 2 / 3, it.id


def test_an_embedder_and_its_reranker_fill_a_gpu_and_grow_alike() -> None:
    by_id = {it.id: it for it in models()}
    one, other = by_id["bge-m3"], by_id["bge-reranker-v2-m3"]
    assert (one.task, other.task) == (Task.EMBED, Task.RERANK)
    assert one.num_gpus + other.num_gpus == 1
    assert one.replicas == other.replicas


def test_some_models_are_kept_warm_and_the_others_may_sleep() -> None:
    kept = {it.id for it in models() if it.num_gpus and it.replicas.min}
    assert kept == {"bge-m3", "bge-reranker-v2-m3"}
    assert {it.task for it in models() if not it.replicas.min} == {Task.EMBED, Task.RERANK}
