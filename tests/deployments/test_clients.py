"""Client libraries as they are, against the running service: each gets the vectors that were meant for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.deployments.conftest import MINILM, ROOT, LiveServer

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(700),
    pytest.mark.parametrize("server", ["haproxy"], indirect=True),  # what a client says is the same behind both
]

CLIENTS = ROOT / "tests" / "clients"
TEXTS = ["The quick brown fox", "jumps over the lazy dog", "Grüße aus 東京 🙂"]
INSTALL_S = 600


@pytest.fixture(scope="session")
def python() -> Path:
    """An interpreter with the libraries, in an environment of its own: they want other versions than the service."""
    folder, wanted = ROOT / ".venv-clients", (CLIENTS / "requirements.txt").read_text()
    done = folder / "installed"
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        install([*map(str, pip), "-r", str(CLIENTS / "requirements.txt")], CLIENTS)
        done.write_text(wanted)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and its library."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "with_openai.mjs"):
        shutil.copy(CLIENTS / name, folder)
    install(["npm", "install", "--no-audit", "--no-fund", "--silent"], folder)
    return folder


def install(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
    assert result.returncode == 0, f"{command[0]} cannot install client libraries:\n{result.stderr[-3000:]}"


def answered(command: list[str], server: LiveServer, folder: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    result = subprocess.run(
        [*command, f"{server.url}/v1", server.key],
        input=json.dumps(TEXTS),
        cwd=folder,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return np.array(json.loads(result.stdout.splitlines()[-1]))


def check(vectors: np.ndarray[tuple[int, int], np.dtype[np.float64]], server: LiveServer) -> None:
    body = {"model": MINILM["id"], "input": TEXTS, "encoding_format": "float"}
    reply = httpx.post(f"{server.url}/v1/embeddings", json=body, headers=server.headers, timeout=120).json()
    right = np.array([row["embedding"] for row in reply["data"]])
    assert vectors.shape == right.shape
    assert (vectors * right).sum(axis=1) == pytest.approx(1, abs=1e-3)
    assert np.abs(right @ right.T - np.eye(len(TEXTS)))[~np.eye(len(TEXTS), dtype=bool)].max() < 0.9


@pytest.mark.parametrize("script", sorted(path.name for path in CLIENTS.glob("with_*.py")))
def test_a_python_library_gets_the_vectors(server: LiveServer, python: Path, script: str, tmp_path: Path) -> None:
    check(answered([str(python), str(CLIENTS / script)], server, tmp_path), server)


@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js with npm, which the service itself does not need")
def test_openai_for_node_gets_the_vectors(server: LiveServer, node: Path) -> None:
    check(answered(["node", "with_openai.mjs"], server, node), server)
