"""Becomes the service: `deployments/foreground.py`, apart from the other commands, which know nothing of Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.config import DEFAULT
from serve_app.cli.terminal import Failed


def run(
    config: Annotated[Path, typer.Argument(help="A Serve config.")] = DEFAULT,
    address: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; local: one of its own.")] = "local",
) -> None:
    """`serve run CONFIG`, but Ctrl-C and SIGTERM drain: nothing new, and what is under way to its end."""
    if not config.is_file():
        raise Failed(f"There is no file {config}.")
    os.execv(sys.executable, [sys.executable, "-m", "serve_app.deployments.foreground", str(config), address])
