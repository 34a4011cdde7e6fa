"""An embedder and a reranker that share one GPU, as `deploy/one-gpu.yaml` has it: a GPU that Ray only believes in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import CrossEncoder

from tests.checkpoints import make_reranker
from tests.deployments.conftest import FAST, MINILM, ROOT, LiveServer
from tests.deployments.libraries import CLIENTS, answered, interpreter

pytestmark = [pytest.mark.live, pytest.mark.timeout(700)]

HALF = {"num_gpus": 0.5, "device": "cpu"}  # a share of the GPU; what runs on it runs on the CPU
QUERY = "ba ce di fo"
UP_S = 8.0  # a replica that had a place would be up by then, on most machines
DOCUMENTS = ["la me ni", "po ru sa te vi " * 60, "ba ce", "di fo gu la", "sa"]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_reranker(tmp_path_factory.mktemp("checkpoint") / "reranker", "xlm-roberta")
    names = {"id": "tiny-reranker", "name": "tests/Tiny-Reranker", "task": "rerank", "class": "large"}
    return {**names, "source": str(folder), "dtype": "float32", "num_cpus": 0.1, **HALF}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory, reranker: dict[str, Any]) -> Iterator[LiveServer]:
    env = FAST | {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 1})}
    live = LiveServer(tmp_path_factory.mktemp("one-gpu"), [MINILM | HALF, reranker], env)
    try:
        live.start()
        yield live
    finally:
        live.stop()


def rank(server: LiveServer, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "tiny-reranker", "query": QUERY, "documents": DOCUMENTS, **fields}
    return httpx.post(f"{server.url}/v1/rerank", json=body, headers=server.headers | (headers or {}), timeout=120)


def expected(reranker: dict[str, Any]) -> Any:
    judge = CrossEncoder(reranker["source"], device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return judge.predict([(QUERY, document) for document in DOCUMENTS], show_progress_bar=False)


def test_both_are_put_on_the_one_gpu_and_a_third_is_not(one_gpu: LiveServer, reranker: dict[str, Any]) -> None:
    third = reranker | {"id": "third", "name": "tests/third"}
    one_gpu.deploy([*one_gpu.models, third])
    one_gpu.wait_until(lambda: "third" in one_gpu.states(), 60)
    time.sleep(UP_S)
    assert one_gpu.states() == {"all-MiniLM-L6-v2": "ready", "tiny-reranker": "ready", "third": "loading"}
    assert one_gpu.replica_pids()["model-third"] == []
    assert rank(one_gpu).status_code == 200
    one_gpu.deploy(one_gpu.models)
    one_gpu.wait_until(lambda: "third" not in one_gpu.states(), 60)


def test_scores_are_those_of_a_cross_encoder_and_a_retry_gets_the_same_bytes(
    one_gpu: LiveServer, reranker: dict[str, Any]
) -> None:
    first, second = [rank(one_gpu, {"Idempotency-Key": "ranked"}, return_documents=True) for _ in range(2)]
    assert first.status_code == 200
    body = first.json()
    assert np.abs(np.array([it["score"] for it in body["scores"]]) - expected(reranker)).max() < 1e-4
    assert body["results"][0]["document"]["text"] == DOCUMENTS[int(np.argmax(expected(reranker)))]
    assert [it["index"] for it in body["usage"]["warnings"]] == [1]
    assert second.content == first.content
    assert second.headers["idempotent-replayed"] == "true"


def test_both_answer_while_both_are_busy(one_gpu: LiveServer, reranker: dict[str, Any]) -> None:
    """Each request gets its own kind of answer, and its own."""
    scores, texts = expected(reranker), [f"text {number}" for number in range(64)]

    def embed() -> tuple[int, int]:
        body = {"model": MINILM["id"], "input": texts, "encoding_format": "float"}
        reply = httpx.post(f"{one_gpu.url}/v1/embeddings", json=body, headers=one_gpu.headers, timeout=120).json()
        return len(reply["data"]), len(reply["data"][0]["embedding"])

    def ranked() -> float:
        found = [it["score"] for it in rank(one_gpu).json()["scores"]]
        return float(np.abs(np.array(found) - scores).max())

    with ThreadPoolExecutor(8) as callers:
        embedding = [callers.submit(embed) for _ in range(12)]
        ranking = [callers.submit(ranked) for _ in range(24)]
        assert {it.result() for it in embedding} == {(64, 384)}
        assert max(it.result() for it in ranking) < 1e-4


@pytest.mark.parametrize("script", sorted(path.name for path in CLIENTS.glob("rank_with_*.py")))
def test_a_python_library_gets_the_ranking(
    one_gpu: LiveServer, reranker: dict[str, Any], script: str, tmp_path: Path
) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS}
    found = answered([str(interpreter()), str(CLIENTS / script)], one_gpu.url, one_gpu.key, asked, tmp_path)
    scores = expected(reranker)
    assert [index for index, _ in found] == np.argsort(-scores).tolist()
    assert [score for _, score in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)


def test_what_was_answered_is_counted_and_the_books_agree(one_gpu: LiveServer) -> None:
    for _ in range(2):
        body = {"model": MINILM["id"], "input": ["twice", "twice"]}
        assert httpx.post(f"{one_gpu.url}/v1/embeddings", json=body, headers=one_gpu.headers, timeout=120).is_success
    name = MINILM["name"]
    one_gpu.wait_until(lambda: f'answered="duplicate",model="{name}"' in _sorted_labels(one_gpu.metrics()), 60)
    audit = one_gpu.audit()
    assert audit.returncode == 0, audit.stdout


def _sorted_labels(page: str) -> str:
    lines = []
    for line in page.splitlines():
        if "serve_app_texts" in line and "{" in line:
            labels = line.partition("{")[2].partition("}")[0].split(",")
            lines.append(",".join(sorted(label for label in labels if label.startswith(("answered=", "model=")))))
    return "\n".join(lines)


def test_the_file_for_clusters_is_such_a_pair() -> None:
    entries = [it["args"] for it in yaml.safe_load((ROOT / "deploy" / "one-gpu.yaml").read_text())["applications"]]
    shares = {entry["id"]: entry["num_gpus"] for entry in entries if "id" in entry}
    assert shares == {"bge-m3": 0.5, "bge-reranker-v2-m3": 0.5}
