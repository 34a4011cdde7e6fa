"""A short part of `scripts/chaos`: a service of its own, killed while clients retry. The long runs are made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN_S, STOP_S = 600.0, 90.0

pytestmark = [pytest.mark.live, pytest.mark.timeout(RUN_S + STOP_S + 30)]


def chaos(result: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and counts. What the script started has ended, whatever happened."""
    command = [sys.executable, str(ROOT / "scripts" / "chaos"), *arguments, "--json", str(result)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=RUN_S)
        finally:
            process.terminate()
            process.wait(STOP_S)
    return process.returncode, output, json.loads(result.read_bytes()) if result.exists() else {}


def test_kills_neither_lose_a_bill_nor_double_one(tmp_path: Path) -> None:
    status, output, told = chaos(
        tmp_path / "told.json", "--calls", "150", "--kills", "6", "--others", "1", "--seed", "7"
    )
    assert status == 0, output
    assert set(told["faults"]) == {
        *("ingress", "idempotency", "encoder", "usage", "controller", "haproxy", "ingress stopped")
    }
    assert told["facts"]["keyed successes"] > 100
    assert told["facts"]["keyed tokens, clients"] == told["facts"]["keyed tokens, ledger"] > 0
    assert not any(told["invariants"].values()), told["shown"]
    assert told["report"]["faults"] == {"double": 0, "lost": 0, "unequal": 0, "unanswered": 0}
