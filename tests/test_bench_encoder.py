"""`scripts/bench encoder` on a machine that has torch and sentence-transformers, and not what serving needs besides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISSING = ("ray", "fastapi", "starlette", "orjson", "redis", "typer")


@pytest.mark.timeout(300)
def test_the_encoder_is_measured_without_ray(tmp_path: Path) -> None:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    settings = "--device cpu --shape mini-qwen2 --budget 256 --seconds 0.01"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "encoder", *settings.split()],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mini-qwen2: 0.8 M parameters, " in done.stdout
    assert "PackedForward" in done.stdout
    assert "SentenceTransformer.encode in " in done.stdout
