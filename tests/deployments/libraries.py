"""Client libraries in environments of their own, and what their scripts in `tests/clients/` print."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.deployments.conftest import ROOT

CLIENTS = ROOT / "tests" / "clients"
INSTALL_S = 600


@functools.cache
def interpreter() -> Path:
    """Python with the libraries: they want other versions than the service."""
    folder, wanted = ROOT / ".venv-clients", (CLIENTS / "requirements.txt").read_text()
    done = folder / "installed"
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        install([*map(str, pip), "-r", str(CLIENTS / "requirements.txt")], CLIENTS)
        done.write_text(wanted)
    return folder / "bin" / "python"


def install(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
    assert result.returncode == 0, f"{command[0]} cannot install client libraries:\n{result.stderr[-3000:]}"


def answered(command: list[str], url: str, key: str, asked: Any, folder: Path) -> Any:
    """What a script prints last, which is JSON, as is what it reads."""
    result = subprocess.run(
        [*command, url, key],
        input=json.dumps(asked),
        cwd=folder,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
