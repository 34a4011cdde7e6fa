"""deploy/kuberay*.yaml as Kubernetes and KubeRay would read it: known fields, and names that lead somewhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.deploy.kuberay import RayService
from tests.deploy.kubernetes import Claim, ConfigMap, Namespace, NetworkPolicy, Service, StatefulSet
from tests.deploy.manifests import FILES, documents, of_kind, parse, pods, raw, ray_pods, secrets

DOCUMENTS = [pytest.param(it, id=f"{it['kind']}-{it['metadata']['name']}") for file in FILES for it in raw(file)]
FREE = {"data", "labels", "matchLabels", "selector", "rayStartParams"}  # any key may stand there


def mappings(at: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where fields have names of Kubernetes' own."""
    if isinstance(at, dict) and not (path and path[-1] in FREE and "matchLabels" not in at):
        yield path
    for key, value in at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ():
        yield from mappings(value, (*path, key))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_field_is_one_that_there_is(document: dict[str, Any]) -> None:
    parse(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_field_that_there_is_not_would_be_found_wherever_it_stood(document: dict[str, Any]) -> None:
    for path in mappings(document):
        broken = at = copy.deepcopy(document)
        for step in path:
            at = at[step]
        at["replica"] = 1
        with pytest.raises(ValidationError):
            parse(broken)


def test_no_name_is_given_twice_and_everything_is_in_the_one_namespace() -> None:
    names = [(it.kind, it.metadata.name) for it in documents()]
    assert len(set(names)) == len(names)
    (namespace,) = of_kind(Namespace)
    assert {it.metadata.namespace for it in documents() if it.kind != "Namespace"} == {namespace}


def test_what_a_pod_reads_or_mounts_is_there_or_is_told_how_to_make() -> None:
    maps, claims = of_kind(ConfigMap), of_kind(Claim)
    for owner, template in pods():
        volumes = {it.name: it for it in template.spec.volumes}
        stateful = of_kind(StatefulSet).get(owner)
        own = {it.metadata.name for it in stateful.spec.volume_claim_templates} if stateful else set()
        for volume in volumes.values():
            assert volume.config_map is None or volume.config_map.name in maps
            assert volume.persistent_volume_claim is None or volume.persistent_volume_claim.claim_name in claims
        for container in template.spec.containers:
            assert {it.name for it in container.volume_mounts} == volumes.keys() | own
            for source in container.env_from:
                assert source.config_map_ref is None or source.config_map_ref.name in maps
                assert source.secret_ref is None or source.secret_ref.name in secrets()


def test_a_secret_has_the_keys_that_are_read_from_it() -> None:
    made = secrets()
    (service,) = of_kind(RayService).values()
    reference = service.spec.ray_cluster_config.gcs_fault_tolerance_options.redis_password.value_from.secret_key_ref
    assert reference.key in made[reference.name]
    for name in of_kind(StatefulSet):
        assert made[name] == {"REDIS_PASSWORD"}
    assert made["serve-app"] == {"SERVE_APP_STORE", "BILLING_SECRET"}


def test_no_secret_is_in_a_file() -> None:
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        parse({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "data": {}})
    for values in of_kind(ConfigMap).values():
        assert not re.search(r"requirepass|password|secret|://", str(values.data), re.IGNORECASE)


def test_a_selector_finds_the_pods_it_is_for_and_no_others() -> None:
    labels = {owner: template.metadata.labels for owner, template in pods()}
    for stateful in of_kind(StatefulSet).values():
        assert stateful.spec.selector.match_labels == labels[stateful.metadata.name]
        assert stateful.spec.service_name in of_kind(Service)
    for service in of_kind(Service).values():
        found = [owner for owner, has in labels.items() if service.spec.selector.items() <= has.items()]
        assert found == [service.metadata.name]
        ports = {port.container_port for it in dict(pods())[found[0]].spec.containers for port in it.ports}
        assert {it.port for it in service.spec.ports} <= ports


def test_a_probe_asks_a_port_that_its_container_has() -> None:
    asked = 0
    for _, template in pods():
        for container in template.spec.containers:
            for probe in filter(None, (container.readiness_probe, container.liveness_probe)):
                target = probe.http_get or probe.tcp_socket
                assert target is not None
                assert target.port in {it.name for it in container.ports}
                asked += 1
    assert asked == 6


def test_no_container_is_root_or_may_become_it() -> None:
    for _, template in pods():
        assert template.spec.security_context.run_as_non_root
        assert template.spec.security_context.run_as_user > 0
        for container in template.spec.containers:
            assert not container.security_context.allow_privilege_escalation
            assert container.security_context.capabilities.drop == ["ALL"]


def test_rays_own_ports_are_for_rays_pods_and_the_operator() -> None:
    (policy,) = of_kind(NetworkPolicy).values()
    ray = {"ray.io/is-ray-node": "yes"}  # KubeRay's label of each
    assert (policy.spec.pod_selector.match_labels, policy.spec.policy_types) == (ray, ["Ingress"])
    inside, everybody = policy.spec.ingress
    peers = [it.pod_selector or it.namespace_selector for it in inside.from_]
    assert [it.match_labels for it in peers if it] == [ray, {"kubernetes.io/metadata.name": "kuberay-system"}]
    (service,) = of_kind(RayService).values()
    ports = {
        port.name: port.container_port
        for _, template in ray_pods(service)
        for it in template.spec.containers
        for port in it.ports
    }
    assert [it.port for it in everybody.ports] == [ports["serve"]]
