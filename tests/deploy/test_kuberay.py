"""deploy/kuberay.yaml as the service needs it: its config, Ray's variables, both Redises, the models' files, an end."""

from __future__ import annotations

import re

import pytest

from serve_app.cli import config
from serve_app.cli.checks import HAPROXY, HAPROXY_PATH, RAY_SETTINGS
from serve_app.core.catalog import Source
from serve_app.core.known import KNOWN
from serve_app.core.settings import IngressSettings
from serve_app.sinks.settings import UsageSettings
from serve_app.stores.redis_client import SETTINGS, unfit
from tests.deploy.kuberay import RayService
from tests.deploy.kubernetes import Claim, ConfigMap, Job, Service, StatefulSet
from tests.deploy.manifests import DEPLOY, PRODUCTION, of_kind, pods, ray_pods, secrets

GIB = 2**30
A_SERVER = {"redis_version": "7.4.0", "redis_mode": "standalone", "role": "master"}


def service() -> RayService:
    (it,) = of_kind(RayService).values()
    return it


def variables() -> dict[str, str]:
    return of_kind(ConfigMap)["serve-app-env"].data


def redis_settings(name: str) -> dict[str, str]:
    """Of the file that the server's command names."""
    command = " ".join(dict(pods())[name].spec.containers[0].command)
    named = re.search(r"exec redis-server /etc/redis/(\S+) -", command)
    assert named
    lines = of_kind(ConfigMap)["redis"].data[named[1]].splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def test_what_is_served_is_production_yaml_to_the_letter() -> None:
    assert service().spec.serve_config_v2 == PRODUCTION.read_text(), "scripts/kuberay writes it"


def test_every_ray_container_has_the_same_variables_and_secrets_and_those_that_scripts_serve_sets() -> None:
    assert {name: variables().get(name) for name in RAY_SETTINGS} == {name: it[0] for name, it in RAY_SETTINGS.items()}
    assert variables()[HAPROXY_PATH] == f"/usr/local/bin/{HAPROXY}"
    for _, template in ray_pods(service()):
        (container,) = template.spec.containers
        read = [it.config_map_ref or it.secret_ref for it in container.env_from]
        assert [it.name for it in read if it] == ["serve-app-env", "serve-app"]


def test_the_store_is_one_that_the_service_takes() -> None:
    found = redis_settings("redis-store")
    assert unfit(A_SERVER, {name: found.get(name, "unset") for name in SETTINGS}) is None


@pytest.mark.parametrize("name", SETTINGS)
def test_with_any_of_its_settings_otherwise_it_is_not(name: str) -> None:
    found = redis_settings("redis-store")
    assert unfit(A_SERVER, {it: found[it] for it in SETTINGS} | {name: "otherwise"})


def test_the_heads_redis_is_another_one_that_keeps_what_it_is_told_over_a_restart() -> None:
    address, _, port = service().spec.ray_cluster_config.gcs_fault_tolerance_options.redis_address.partition(":")
    assert [it.port for it in of_kind(Service)[address].spec.ports] == [int(port)]
    assert address == "redis-gcs"
    found = redis_settings(address)
    assert (found["appendonly"], found["maxmemory-policy"]) == ("yes", "noeviction")
    head = (DEPLOY / "kuberay.yaml").read_text().partition("\n---\n")[0]
    assert "SERVE_APP_STORE=redis://:%s@redis-store:6379/0" in head
    assert [it.port for it in of_kind(Service)["redis-store"].spec.ports] == [6379]


def test_a_redis_has_its_password_from_its_secret_and_not_on_its_command_line() -> None:
    for name in of_kind(StatefulSet):
        (container,) = dict(pods())[name].spec.containers
        command, _, stdin = container.command[-1].partition("\n")
        assert "PASSWORD" not in command
        assert stdin.startswith("requirepass $REDIS_PASSWORD\n")
        assert [it.secret_ref.name for it in container.env_from if it.secret_ref] == [name]


def test_a_sink_finds_its_secret() -> None:
    usage = next(it for it in config.read(PRODUCTION).services if isinstance(it, UsageSettings))
    for sink in usage.sinks:
        assert sink.secret
        assert sink.secret.get_secret_value().removeprefix("env:") in secrets()["serve-app"]


def test_a_pod_that_is_told_to_go_has_the_time_that_a_request_may_take() -> None:
    ingress = next(it for it in config.read(PRODUCTION).services if isinstance(it, IngressSettings))
    drain_s = float(variables()["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drain_s > ingress.request_timeout_s
    for _, template in ray_pods(service()):
        assert template.spec.termination_grace_period_seconds > drain_s + 30  # for Ray to end what is left
    assert service().spec.ray_cluster_deletion_delay_seconds > ingress.request_timeout_s


def test_requests_go_to_workers_whose_proxy_finds_an_ingress() -> None:
    assert service().spec.exclude_head_pod_from_serve_svc
    for owner, template in ray_pods(service()):
        (container,) = template.spec.containers
        assert {it.name: it.container_port for it in container.ports}["serve"] == config.read(PRODUCTION).port
        if owner != "head":  # which answers no requests
            assert container.readiness_probe
            assert container.readiness_probe.http_get
            assert container.readiness_probe.http_get.path == "/-/healthz"


def test_folders_that_the_config_names_are_mounted_and_models_cannot_be_changed() -> None:
    found = config.read(PRODUCTION)
    written = {it.blobs for it in found.services if it.blobs} | {it.self_tests for it in found.models if it.self_tests}
    read = {it.source for it in found.models if Source.parse(it.source).kind == "directory"}
    for _, template in ray_pods(service()):
        (container,) = template.spec.containers
        mounts = {it.mount_path: it.read_only for it in container.volume_mounts}
        assert mounts == {"/models": True, "/shared": False}
        assert {folder.split("/")[1] for folder in read} == {"models"}
        assert {folder.split("/")[1] for folder in written} == {"shared"}
    for name in ("models", "shared"):
        assert of_kind(Claim)[name].spec.access_modes == ["ReadWriteMany"]


def test_the_job_brings_every_model_that_is_served_from_a_folder_and_there_is_room() -> None:
    job = of_kind(Job)["pull-models"]
    (container,) = job.spec.template.spec.containers
    pull, _, convert = container.command[-1].partition(" || ")
    pulled = {f"/models/{name}" for name in re.findall(r"^  (\S+/[^@\s]+)(?:@[0-9a-f]{40})?(?: \\)?$", pull, re.M)}
    converted = set(re.findall(r'folder, draft = Path\("(\S+?)"\)', convert))
    served = [it for it in config.read(PRODUCTION).models if Source.parse(it.source).kind == "directory"]
    assert pulled | converted == {it.source for it in served}
    assert converted == {"/models/BAAI/bge-m3"}
    needed = sum(KNOWN[it.name.lower()].parameters * 10**6 * 4 for it in served)  # as float32, as some are
    claim = of_kind(Claim)["models"].spec.resources.requests["storage"]
    assert int(claim.removesuffix("Gi")) * GIB > 1.2 * needed
