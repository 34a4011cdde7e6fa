"""deploy/cluster.yaml through Ray's own schema; and whether its nodes, and KubeRay's, have room for production.yaml."""

from __future__ import annotations

import copy
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.cli import config
from serve_app.core.settings import IdempotencySettings, IngressSettings
from tests.deploy.kubernetes import ConfigMap
from tests.deploy.manifests import DEPLOY, PRODUCTION, of_kind, raw


def ray_up() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    return content


def prepared(content: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` reads it: with Ray's defaults for what it does not say. Raises jsonschema.ValidationError."""
    found: dict[str, Any] = prepare_config(copy.deepcopy(content))
    validate_config(found)
    return found


def kuberay() -> dict[str, Any]:
    """As Ray's autoscaler in the head's pod reads the manifest."""
    service = next(it for it in raw("kuberay.yaml") if it["kind"] == "RayService")
    cluster = {"metadata": service["metadata"], "spec": service["spec"]["rayClusterConfig"]}
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(found)
    return found


CLUSTERS = [pytest.param(kuberay, id="kuberay"), pytest.param(lambda: prepared(ray_up()), id="ray up")]


def test_ray_takes_the_file() -> None:
    assert prepared(ray_up())["head_node_type"] == "head"


@pytest.mark.parametrize("path", ["", "docker", "auth", "available_node_types.gpu", "available_node_types.gpu.docker"])
def test_a_field_that_there_is_not_would_be_found(path: str) -> None:
    broken = at = ray_up()
    for step in filter(None, path.split(".")):
        at = at[step]
    at["typo"] = 1
    with pytest.raises(jsonschema.ValidationError, match="typo"):
        prepared(broken)


def test_no_node_installs_a_ray_of_its_own() -> None:
    found = prepared(ray_up())
    assert found["setup_commands"] == found["worker_setup_commands"] == []
    assert all("boto3" in it for it in found["head_setup_commands"])


def test_its_containers_have_the_variables_of_kuberays() -> None:
    given = dict(it.removeprefix("-e ").split("=", 1) for it in ray_up()["docker"]["run_options"] if it[:3] == "-e ")
    assert given == of_kind(ConfigMap)["serve-app-env"].data


def test_its_containers_have_the_folders_and_their_secrets_come_from_a_file_of_the_machine() -> None:
    options, text = ray_up()["docker"]["run_options"], (DEPLOY / "cluster.yaml").read_text()
    assert {it.partition(":")[2] for it in options if it.startswith("-v ")} == {"/models:ro", "/shared"}
    (file,) = (it.removeprefix("--env-file ") for it in options if it.startswith("--env-file "))
    written = [it for it in ray_up()["initialization_commands"] if it.endswith(f"> {file}")]
    assert len(written) == 1
    assert written[0].startswith("umask 077;")
    assert "SERVE_APP_STORE" not in re.sub(r"^#.*$", "", text, flags=re.M)


def test_gpu_nodes_have_the_gpus_image_and_the_gpu() -> None:
    found = ray_up()
    gpu = found["available_node_types"]["gpu"]["docker"]
    assert gpu["worker_image"] == found["docker"]["image"].replace("-cpu", "-cuda")
    assert gpu["worker_run_options"] == ["--gpus all"]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_head_offers_nothing_and_a_gpu_node_its_one_gpu_alone(cluster: Any) -> None:
    found = cluster()
    types = {name: {it: kind["resources"].get(it, 0) for it in ("CPU", "GPU")} for name, kind in _types(found).items()}
    assert types[found["head_node_type"]] == {"CPU": 0, "GPU": 0}
    assert types["gpu"] == {"CPU": 0, "GPU": 1}
    assert types["cpu"] == {"CPU": 4, "GPU": 0}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_production_fits_when_it_starts_and_when_it_has_grown(cluster: Any) -> None:
    found, served = cluster(), config.read(PRODUCTION)
    cpu, gpu = _types(found)["cpu"], _types(found)["gpu"]
    processes = {IngressSettings: "replicas", IdempotencySettings: "shards"}
    fixed = sum(it.num_cpus * getattr(it, processes.get(type(it), ""), 1) for it in served.services)
    cpus_least = fixed + sum(it.num_cpus * it.replicas.min for it in served.models)
    cpus_most = fixed + sum(it.num_cpus * it.replicas.max for it in served.models)
    assert cpus_least <= cpu["min_workers"] * cpu["resources"]["CPU"]
    assert cpus_most <= cpu["max_workers"] * cpu["resources"]["CPU"]
    gpus = [(it.num_gpus, it.replicas) for it in served.models if it.num_gpus]
    assert sum(share * it.min for share, it in gpus) <= gpu["min_workers"]
    assert sum(share * it.max for share, it in gpus) <= gpu["max_workers"]
    assert cpu["min_workers"] > 1  # a node may go
    assert cpu["max_workers"] + gpu["max_workers"] <= found["max_workers"]


def _types(found: dict[str, Any]) -> dict[str, Any]:
    types: dict[str, Any] = found["available_node_types"]
    return types
