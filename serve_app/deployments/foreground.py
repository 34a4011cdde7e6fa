"""`serve run`, whose end drains: Serve ends its proxies first, and with them the requests that are under way.

So each ingress is told to admit nothing more, and waited for, before Serve is shut down. SIGTERM does as Ctrl-C does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve import scripts

DRAIN_S = 130.0  # by default a request may take two minutes
LOOK_S = 0.1
INGRESS = "ingress"  # the deployment's name, in whatever application
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Leave(BaseException):
    """Not an Exception: `serve run` would take it for an error of its own."""


def main(config: str, address: str) -> None:
    """Until a signal comes. A second one ends it at once. address: of a Ray cluster, or `local` for one of its own."""
    ray.init(address=address, namespace="serve")  # before `serve run` does: Ray sets handlers, too
    for number in SIGNALS:
        signal.signal(number, _leave)
    try:
        scripts.cli(["run", config], standalone_mode=False)
    except _Leave:
        asyncio.run(_end())


def _leave(number: int, frame: Any) -> None:
    raise _Leave


async def _end() -> None:
    draining = asyncio.create_task(_drain())
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, draining.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await draining
    finally:
        await serve.shutdown_async()


async def _drain() -> None:
    """In HAProxy's mode handles want an event loop."""
    print("Draining: what is under way is answered, and nothing else. Ctrl-C again ends it at once.", flush=True)  # noqa: T201
    deadline = time.monotonic() + DRAIN_S
    for app, overview in serve.status().applications.items():
        if INGRESS in overview.deployments:
            handle = serve.get_deployment_handle(INGRESS, app)
            while time.monotonic() < deadline:
                if not any(await handle.broadcast("drain").results_async(timeout_s=DRAIN_S)):
                    break
                await asyncio.sleep(LOOK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
