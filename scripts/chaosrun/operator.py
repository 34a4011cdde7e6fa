"""An operator's commands while the service works: processes that open its store, look, and close it again.

What they see is no matter here. That they come and go must take nothing away from the processes that stay.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from asyncio.subprocess import DEVNULL
from pathlib import Path

from chaosrun.history import History

COMMANDS = (("workspace", "list"), ("key", "list", "ws_first"), ("ledger", "usage"))
PAUSE_S = 5.0


async def operate(root: Path, store_url: str, history: History) -> None:
    """One command after the other, until cancelled. One that a killed store refuses is counted, and no fault."""
    environ = os.environ | {"SERVE_APP_STORE": store_url, "PYTHONPATH": str(root)}
    for command in itertools.cycle(COMMANDS):
        await asyncio.sleep(PAUSE_S)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serve_app.cli", *command), env=environ, stdout=DEVNULL, stderr=DEVNULL
        )
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        history.counts["operator's commands" if status == 0 else "operator's commands, refused"] += 1
