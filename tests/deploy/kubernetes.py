"""The Kubernetes fields that deploy/ uses, as strict models: a field that is not written down here is taken for a typo.

After Kubernetes' API. A field that is used for the first time is added here, from there; `kuberay.py` has KubeRay's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i)?$")]
Resource = Literal["cpu", "memory", "storage", "ephemeral-storage", "nvidia.com/gpu"]
Labels = dict[str, str]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class OneOf(Fields):
    @model_validator(mode="after")
    def _one(self) -> OneOf:
        assert len(self.model_fields_set - {"name"}) == 1, "exactly one of these may be set"
        return self


class Metadata(Fields):
    name: Name
    namespace: Name | None = None


class Named(Fields):
    name: Name


class EnvFrom(OneOf):
    config_map_ref: Named | None = None
    secret_ref: Named | None = None


class SecretKey(Named):
    key: str


class Port(Fields):
    name: Annotated[str, Field(pattern=r"^[a-z][-a-z0-9]{0,14}$")]
    container_port: int


class HttpGet(Fields):
    path: str
    port: int | str


class TcpSocket(Fields):
    port: int | str


class Probe(Fields):
    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    period_seconds: int = 10
    timeout_seconds: int = 1
    failure_threshold: int = 3


class Resources(Fields):
    requests: dict[Resource, Quantity]
    limits: dict[Resource, Quantity] = {}


class Capabilities(Fields):
    drop: list[str]


class ContainerSecurity(Fields):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Mount(Fields):
    name: Name
    mount_path: str
    read_only: bool = False


class Container(Fields):
    name: Name
    image: str
    command: list[str] = []
    env_from: list[EnvFrom] = []
    ports: list[Port] = []
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[Mount]


class Claimed(Fields):
    claim_name: Name


class Volume(OneOf):
    name: Name
    persistent_volume_claim: Claimed | None = None
    config_map: Named | None = None


class PodSecurity(Fields):
    run_as_non_root: bool
    run_as_user: int
    run_as_group: int | None = None
    fs_group: int
    fs_group_change_policy: Literal["Always", "OnRootMismatch"] = "Always"


class LabelSelector(Fields):
    match_labels: Labels


class Spread(Fields):
    max_skew: int
    topology_key: str
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    label_selector: LabelSelector


class Toleration(Fields):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class Pod(Fields):
    restart_policy: Literal["Always", "OnFailure", "Never"] | None = None
    termination_grace_period_seconds: int = 30
    automount_service_account_token: bool = True
    security_context: PodSecurity
    topology_spread_constraints: list[Spread] = []
    node_selector: Labels = {}
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class TemplateMetadata(Fields):
    labels: Labels


class PodTemplate(Fields):
    metadata: TemplateMetadata = TemplateMetadata(labels={})
    spec: Pod


class ClaimSpec(Fields):
    storage_class_name: str | None = None
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]]
    resources: Resources


class ClaimTemplate(Fields):
    metadata: Metadata
    spec: ClaimSpec


class StatefulSetSpec(Fields):
    service_name: Name
    replicas: int
    selector: LabelSelector
    template: PodTemplate
    volume_claim_templates: list[ClaimTemplate]


class JobSpec(Fields):
    backoff_limit: int
    template: PodTemplate


class ServicePort(Fields):
    name: str
    port: int


class ServiceSpec(Fields):
    selector: Labels
    ports: list[ServicePort]


class Peer(OneOf):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None


class PolicyPort(Fields):
    port: int


class Ingress(Fields):
    from_: Annotated[list[Peer], Field(alias="from")] = []
    ports: list[PolicyPort] = []


class PolicySpec(Fields):
    pod_selector: LabelSelector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]


class Object(Fields):
    metadata: Metadata


class Namespace(Object):
    api_version: Literal["v1"]
    kind: Literal["Namespace"]


class ConfigMap(Object):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    data: dict[str, str]


class Service(Object):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    spec: ServiceSpec


class Claim(Object):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    spec: ClaimSpec


class StatefulSet(Object):
    api_version: Literal["apps/v1"]
    kind: Literal["StatefulSet"]
    spec: StatefulSetSpec


class Job(Object):
    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    spec: JobSpec


class NetworkPolicy(Object):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    spec: PolicySpec
