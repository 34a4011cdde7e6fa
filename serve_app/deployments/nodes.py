"""A SQLite file serves the processes of one machine: on a cluster of several, its users must refuse to start."""

from __future__ import annotations

import ray

from serve_app.stores import StoreUnfit, is_local


def check_nodes(url: str) -> None:
    """Raises StoreUnfit if the store is a file and the cluster has several machines."""
    if is_local(url):
        machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        if len(machines) > 1:
            raise StoreUnfit(
                f"The store is a SQLite file, and this cluster has {len(machines)} machines: "
                "set `store: redis://HOST:PORT/DB` in the args of ingress, idempotency and usage."
            )
