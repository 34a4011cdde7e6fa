"""A service of the run's own: its config, its folders, its store with two workspaces, and the processes that it is.

The config is `deployments.yaml` with two ingress replicas, another store, and the builders of `app.py`. On a cluster
there are two encoders, too, on different nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from benchmark import server as bench_server
from benchmark.server import Server, serving

from chaosrun import ChaosError
from chaosrun.app import JOURNAL
from chaosrun.callers import Tenant
from chaosrun.clock import CLOCKS
from chaosrun.cluster import Cluster
from serve_app import stores
from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace

SINK = "files"
LEASE_S = 6.0  # a little longer than a call to the actor may take; the default would keep callers of the dead for 15
INGRESSES, ENCODERS = 2, 2  # as many encoders on a cluster only
DISK_BYTES = 256 << 20
START_S = 400.0  # a benchmark wants a quiet machine; this is run on busy ones, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    folder: Path
    store_url: str
    server: Server
    model: str
    cluster: Cluster | None
    small_disk: bool  # what is stored lies on a file system that can be filled

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    @property
    def disk(self) -> Path:
        return disk_of(self.folder)

    @property
    def sink(self) -> Path:
        return self.disk / "usage"

    @property
    def blobs(self) -> Path:
        return self.disk / "blobs"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def clocks(self) -> Path:
        return self.folder / "clocks"

    def wanted(self, kind: str) -> int:
        """Replicas that the config asks for."""
        return {"ingress": INGRESSES, "encoder": ENCODERS if self.cluster else 1}.get(kind, 1)

    def titles(self) -> dict[str, str]:
        """By kind of process: the application, which the processes' titles begin with."""
        return {"ingress": "ingress", "idempotency": "idempotency", "usage": "usage", "encoder": self.model}

    def replicas(self, kind: str) -> list[psutil.Process]:
        """That run now."""
        return self.titled(f"ray::ServeReplica:{self.titles()[kind]}:")

    def titled(self, title: str) -> list[psutil.Process]:
        """Processes whose command line, without its folder, begins so."""
        found = []
        for process in self.server.processes():
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).rpartition("/bin/")[2].startswith(title):
                    found.append(process)
        return found

    def running(self, kind: str) -> set[int]:
        """Process ids of the replicas that Serve calls running. Raises OSError, ValueError, KeyError."""
        with urllib.request.urlopen(f"{self._dashboard()}/api/serve/applications/", timeout=5) as reply:
            application = json.load(reply)["applications"][self.titles()[kind]]
        return {
            int(replica["pid"])
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }

    def _dashboard(self) -> str:
        if self.cluster is not None:
            return self.cluster.dashboard
        found = re.search(r"http://127\.0\.0\.1:\d+", (self.folder / "server.log").read_text(errors="replace"))
        if found is None:
            raise ChaosError("the server's log names no dashboard")
        return found[0]


def disk_of(folder: Path) -> Path:
    """Where the store, the large replies and the usage files lie."""
    return folder / "disk"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own for what is stored. Yields False, with a folder, where this user may mount none."""
    disk = disk_of(folder)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextlib.contextmanager
def installed(
    root: Path, folder: Path, store_url: str, *, workers: int, small_disk: bool, torn: bool
) -> Iterator[Installation]:
    """Ready. folder: short, for sockets lie in it. workers: nodes beside the head; 0: one node that is all."""
    cluster = Cluster(folder, workers) if workers else None
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    model = _configure(config["applications"], folder, store_url, cluster=cluster is not None, torn=torn)
    if cluster:
        config["proxy_location"] = "HeadOnly"  # one machine has the port once
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    (folder / "clocks").mkdir()
    bench_server.START_S = START_S
    with (
        _environment(_surroundings(root, folder)),
        serving(path, root, folder, cluster=cluster.start if cluster else None) as server,
    ):
        yield Installation(
            folder=folder, store_url=store_url, server=server, model=model, cluster=cluster, small_disk=small_disk
        )


async def open_accounts(store_url: str) -> tuple[Tenant, Tenant]:
    """Two workspaces, whose events lie in different shards, and a key of each; before the service starts."""
    store = await stores.open_store(store_url)
    tenants, now_ms = [], time.time_ns() // 1_000_000
    for name in ("first", "second"):
        id, text = f"ws_{name}", keys.mint(secrets.token_bytes(keys.SECRET_BYTES))
        await store.add_workspace(Workspace(id=id, name=name, plan=Plan.PRO, created_ms=now_ms))
        await store.put_key(
            ApiKey(id=f"key_{name}", workspace=id, name=name, digest=keys.digest(text), created_ms=now_ms)
        )
        tenants.append(Tenant(workspace=id, api_key=text))
    await store.close()
    return tenants[0], tenants[1]


def _configure(applications: list[dict[str, Any]], folder: Path, store_url: str, *, cluster: bool, torn: bool) -> str:
    """The model's application, which bears its name."""
    model, disk = "", disk_of(folder)
    where = {"store": store_url, "blobs": str(disk / "blobs")}
    for application in applications:
        args = application["args"]
        match application["import_path"].rpartition(":")[2]:
            case "ingress":
                application["import_path"] = "chaosrun.app:ingress"
                args |= where | {"replicas": INGRESSES, "lease_s": LEASE_S}
            case "idempotency":
                application["import_path"] = f"chaosrun.app:{'torn_' if torn else ''}idempotency"
                args |= where
            case "usage":
                application["import_path"] = "chaosrun.app:usage"
                args |= where | {"sinks": [{"name": SINK, "url": f"jsonl:{disk / 'usage'}"}]}
            case "model":
                model = application["name"] = args["id"]
                if cluster:
                    args |= {"replicas": {"min": ENCODERS, "max": ENCODERS}, "max_replicas_per_node": 1}
    return model


def _surroundings(root: Path, folder: Path) -> dict[str, str]:
    """What keeps it apart from other services of this machine."""
    return {
        JOURNAL: str(folder / "journal"),
        CLOCKS: str(folder / "clocks"),
        "PYTHONPATH": str(root / "scripts"),
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_health_check_period_ms": "1000",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Of this process, for what it starts."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
