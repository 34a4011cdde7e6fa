"""A cluster of several nodes on one machine: `ray start`, once for the head and once for each worker.

The head has no room for replicas, so that what a node takes with it is the service's. A node that dies, dies whole.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from benchmark.machine import trees
from benchmark.server import HOST, free_ports
from ray.util import get_node_ip_address

from chaosrun import ChaosError

START_S = 120.0
WORKER_CPUS = 4
UP = "Ray runtime started."  # says `ray start`
STORE_BYTES = 100_000_000  # of Ray's objects: what is passed here is small


class Cluster:
    """workers: nodes beside the head."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder = folder
        self._workers = workers
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._environment: dict[str, str] = {}
        self._port, self._dashboard = free_ports(2)
        self._address = f"{get_node_ip_address()}:{self._port}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self._dashboard}"

    @property
    def workers(self) -> list[int]:
        """Numbers of those that run."""
        return [number for number, node in self._nodes.items() if number and node.poll() is None]

    def start(self, environment: dict[str, str]) -> str:
        """All nodes; returns the address."""
        self._environment = environment
        head = ["--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=true"]
        self._start(0, [*head, f"--dashboard-host={HOST}", f"--dashboard-port={self._dashboard}"])
        _wait_for(self._port)
        for number in range(1, self._workers + 1):
            self.add(number)
            self._wait_until_up(number)  # two that start at the same time may take each other's ports
        return self._address

    def add(self, number: int) -> None:
        self._start(number, [f"--address={self._address}", f"--num-cpus={WORKER_CPUS}"])

    def revive(self) -> None:
        """Starts workers anew that ended by themselves."""
        for number, node in [*self._nodes.items()]:
            if number and node.poll() is not None:
                self.add(number)

    def kill(self, number: int) -> set[int]:
        """A worker, and every process on it, as if its plug were pulled: their ids."""
        node = self._nodes[number]
        processes = trees([node.pid])
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        node.wait()
        return {process.pid for process in processes}

    def _wait_until_up(self, number: int) -> None:
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            self.revive()
            if UP in self._log(number).read_text(errors="replace"):
                return
            time.sleep(0.5)
        raise ChaosError(f"worker {number} is not up {START_S:g} s after its start")

    def _log(self, number: int) -> Path:
        return self._folder / f"node-{number}.log"

    def _start(self, number: int, words: list[str]) -> None:
        everywhere = [f"--object-store-memory={STORE_BYTES}", "--block"]
        command = [str(Path(sys.executable).parent / "ray"), "start", *words, *everywhere]
        with self._log(number).open("ab") as log:
            self._nodes[number] = subprocess.Popen(
                command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )


def _wait_for(port: int) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.2)
    raise ChaosError(f"the head does not listen {START_S:g} s after its start")
