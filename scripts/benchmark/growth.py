"""A model that sleeps, under a load that rises and stops: when replicas and nodes come and go, and what callers see.

The nodes are Ray's own fakes: processes of this machine that Ray's autoscaler starts and ends as it would a cloud's,
each with one GPU that is none. Callers are OpenAI's client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil
import yaml
from ray.util import get_node_ip_address

from benchmark import BenchError
from benchmark.server import HOST, Server, serving
from benchmark.workloads import passages, short_queries

MODEL, MOST = "all-MiniLM-L6-v2", 3
RISE = ((0.0, 1), (1.0, 8))  # callers, after how many of `--seconds`
WAIT_S = 240.0  # for a number of replicas or nodes
LOOK_S = 1.0
RETRIES = 5  # of OpenAI's client


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench growth", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, help="of one caller, before eight come (default: 20)")
    add("--idle", type=float, default=10.0, help="after which a replica, and then a node, goes (default: 10 s)")
    add("--seed", type=int, default=1, help="of the texts (default: 1)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, root: Path) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        config = _config(root, folder, options.idle)
        print("starting a cluster of one node, and the service on it", file=sys.stderr)
        cluster = _Cluster(folder, idle_s=options.idle)
        server = stack.enter_context(serving(config, root, folder, cluster=cluster.start))
        print("\n".join(asyncio.run(_Growth(server, options).story())))


def _config(root: Path, folder: Path, idle_s: float) -> Path:
    """The usual one, with a model that may sleep and that only the nodes to come have room for."""
    config: dict[str, Any] = yaml.safe_load((root / "deployments.yaml").read_text())
    for application in config["applications"]:
        if application["args"].get("id") == MODEL:
            scaling = {"min": 0, "max": MOST, "upscale_delay_s": 2.0, "downscale_delay_s": idle_s}
            application["args"] |= {"num_gpus": 1, "device": "cpu", "num_cpus": 0, "replicas": scaling}
            application["args"] |= {"threads": 1}
    path = folder / "growth.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


_NOTHING = (  # what a cluster of machines would do on each, and Ray asks for
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class _Cluster:
    """`ray start --head`, with an autoscaler whose nodes are fakes."""

    def __init__(self, folder: Path, *, idle_s: float) -> None:
        self._folder, self._idle_s = folder, idle_s

    def start(self, environment: dict[str, str]) -> str:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        address = f"{get_node_ip_address()}:{port}"
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": "FAKE_HEAD_NODE_ID",
        }
        head = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 0}
        worker = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST}
        autoscaling = {
            "cluster_name": "growth",
            "provider": provider,
            "max_workers": MOST,
            "idle_timeout_minutes": self._idle_s / 60,
            "available_node_types": {"ray.head.default": head, "gpu": worker},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 10,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            **{name: [] for name in _NOTHING},
        }
        config = self._folder / "autoscaling.json"
        config.write_text(json.dumps(autoscaling))
        fakes = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
        fakes |= {"RAY_CLOUD_INSTANCE_ID": "FAKE_HEAD_NODE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "FAKE_HEAD_NODE_ID"}
        quick = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2"}
        environment |= fakes | quick
        words = ["start", "--head", f"--port={port}", "--num-cpus=2", "--num-gpus=0"]
        words += [f"--autoscaling-config={config}", "--dashboard-port=0", "--object-store-memory=200000000"]
        command = [str(Path(sys.executable).parent / "ray"), *words]
        started = subprocess.run(
            command, env=environment, cwd=self._folder, capture_output=True, text=True, check=False
        )
        if started.returncode:
            raise BenchError(f"ray start ended with {started.returncode}:\n{started.stderr}{started.stdout}")
        return address


@dataclass(slots=True)
class _Callers:
    """What OpenAI's client saw."""

    latencies_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: list[str] = field(default_factory=list)


class _Growth:
    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server, self._options = server, options
        self._seen = _Callers()
        self._texts = itertools.cycle(passages(options.seed).take(64 * 32))

    async def story(self) -> list[str]:
        await self._until(lambda at: at == (0, 0), "the first replica and its node to go")
        lines, start_s = [], time.perf_counter()

        def note(what: str) -> None:
            print(f"{time.perf_counter() - start_s:7.1f} s  {what}", flush=True)

        watch = asyncio.create_task(self._watch(note))
        note("a first request, to a model that sleeps")
        await self._ask(short_queries(self._options.seed).take(1))
        note(f"answered: {self._seen.latencies_s[0]:.1f} s, of which it is told nothing")
        stop = asyncio.Event()
        callers = []
        for part, count in RISE:
            await asyncio.sleep(part * self._options.seconds)
            note(f"{count} more callers, 64 passages each")
            callers += [asyncio.create_task(self._call(stop)) for _ in range(count)]
        await self._until(lambda at: at[0] == MOST, f"{MOST} replicas")
        await asyncio.sleep(self._options.seconds)
        stop.set()
        await asyncio.gather(*callers)
        note("the load stops")
        await self._until(lambda at: at == (0, 0), "all replicas and nodes to go")
        watch.cancel()
        seen = self._seen
        first, *rest = seen.latencies_s
        lines.append(
            f"{len(seen.latencies_s):,} requests, {seen.tokens:,} tokens, {len(seen.failed)} failed {seen.failed}"
        )
        lines.append(f"the first {first:.1f} s; the others median {median(rest):.2f} s, longest {max(rest):.1f} s")
        return lines

    async def _call(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._ask([*itertools.islice(self._texts, 64)])

    async def _ask(self, texts: list[str]) -> None:
        import openai

        start_s = time.perf_counter()
        async with openai.AsyncOpenAI(
            api_key=self._server.api_key,
            base_url=f"{self._server.url}/v1",
            max_retries=RETRIES,
            http_client=httpx2.AsyncClient(trust_env=False),
        ) as client:
            try:
                reply = await client.embeddings.create(model=MODEL, input=texts)
            except openai.OpenAIError as error:
                self._seen.failed.append(type(error).__name__)
                return
        self._seen.latencies_s.append(time.perf_counter() - start_s)
        self._seen.tokens += reply.usage.total_tokens

    async def _watch(self, note: Any) -> None:
        before = (0, 0)
        while True:
            if (now := await self._count()) != before:
                note(f"replicas {now[0]}, nodes beside the head {now[1]}")
                before = now
            await asyncio.sleep(LOOK_S)

    async def _until(self, reached: Any, what: str) -> None:
        until_s = time.monotonic() + WAIT_S
        while not reached(await self._count()):
            if time.monotonic() > until_s:
                raise BenchError(f"waited {WAIT_S:g} s for {what}: replicas and nodes are {await self._count()}")
            await asyncio.sleep(LOOK_S)

    async def _count(self) -> tuple[int, int]:
        """(replicas, nodes beside the head)."""
        _, ready = await asyncio.to_thread(self._server.readiness)
        raylets = [process for process in self._server.processes() if _is_raylet(process)]
        return int(ready["models"][MODEL]["replicas"]), len(raylets) - 1


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
