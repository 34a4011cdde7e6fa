"""KubeRay's RayService, `ray.io/v1`: the fields that deploy/ uses, after the schema that KubeRay installs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tests.deploy.kubernetes import Fields, Name, Object, PodTemplate, Resources, SecretKey


class ValueFrom(Fields):
    secret_key_ref: SecretKey


class Credential(Fields):
    value_from: ValueFrom


class GcsFaultTolerance(Fields):
    redis_address: Annotated[str, Field(pattern=r"^[-a-z0-9.]+:[0-9]+$")]
    redis_password: Credential


class Autoscaler(Fields):
    version: Literal["v1", "v2"]
    idle_timeout_seconds: Annotated[int, Field(ge=0)]
    resources: Resources


class Head(Fields):
    ray_start_params: dict[str, str]
    template: PodTemplate


class Workers(Head):
    group_name: Name
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=1)]


class RayCluster(Fields):
    ray_version: str
    gcs_fault_tolerance_options: GcsFaultTolerance
    enable_in_tree_autoscaling: bool
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Workers]


class Upgrade(Fields):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Fields):
    upgrade_strategy: Upgrade
    ray_cluster_deletion_delay_seconds: Annotated[int, Field(ge=0)]
    exclude_head_pod_from_serve_svc: bool
    ray_cluster_config: RayCluster
    serve_config_v2: Annotated[str, Field(alias="serveConfigV2")]


class RayService(Object):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    spec: RayServiceSpec
