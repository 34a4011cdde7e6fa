"""Client libraries as they are, against the running service: each gets the vectors that were meant for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.deployments.conftest import MINILM, LiveServer
from tests.deployments.libraries import CLIENTS, answered, install, interpreter

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(700),
    pytest.mark.parametrize("server", ["haproxy"], indirect=True),  # what a client says is the same behind both
]

TEXTS = ["The quick brown fox", "jumps over the lazy dog", "Grüße aus 東京 🙂"]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and its library."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "with_openai.mjs"):
        shutil.copy(CLIENTS / name, folder)
    install(["npm", "install", "--no-audit", "--no-fund", "--silent"], folder)
    return folder


def check(rows: Any, server: LiveServer) -> None:
    body = {"model": MINILM["id"], "input": TEXTS, "encoding_format": "float"}
    reply = httpx.post(f"{server.url}/v1/embeddings", json=body, headers=server.headers, timeout=120).json()
    vectors, right = np.array(rows), np.array([row["embedding"] for row in reply["data"]])
    assert vectors.shape == right.shape
    assert (vectors * right).sum(axis=1) == pytest.approx(1, abs=1e-3)
    assert np.abs(right @ right.T - np.eye(len(TEXTS)))[~np.eye(len(TEXTS), dtype=bool)].max() < 0.9


@pytest.mark.parametrize("script", sorted(path.name for path in CLIENTS.glob("with_*.py")))
def test_a_python_library_gets_the_vectors(server: LiveServer, script: str, tmp_path: Path) -> None:
    command = [str(interpreter()), str(CLIENTS / script)]
    check(answered(command, f"{server.url}/v1", server.key, TEXTS, tmp_path), server)


@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js with npm, which the service itself does not need")
def test_openai_for_node_gets_the_vectors(server: LiveServer, node: Path) -> None:
    check(answered(["node", "with_openai.mjs"], f"{server.url}/v1", server.key, TEXTS, node), server)
