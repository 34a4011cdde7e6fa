"""The Kubernetes manifests of deploy/, read through the models of `kubernetes.py` and `kuberay.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, TypeAdapter

from tests.deploy.kuberay import RayService
from tests.deploy.kubernetes import (
    Claim,
    ConfigMap,
    Job,
    Namespace,
    NetworkPolicy,
    Object,
    PodTemplate,
    Service,
    StatefulSet,
)

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PRODUCTION = DEPLOY / "production.yaml"
FILES = ("kuberay-models.yaml", "kuberay.yaml")

Document = Namespace | ConfigMap | Service | Claim | StatefulSet | Job | NetworkPolicy | RayService
_DOCUMENT: TypeAdapter[Document] = TypeAdapter(Annotated[Document, Field(discriminator="kind")])
Kind = TypeVar("Kind", bound=Object)


def raw(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def parse(document: dict[str, Any]) -> Document:
    """Raises ValidationError."""
    return _DOCUMENT.validate_python(document)


@cache
def documents() -> tuple[Document, ...]:
    return tuple(parse(document) for file in FILES for document in raw(file))


def of_kind(kind: type[Kind]) -> dict[str, Kind]:
    return {it.metadata.name: it for it in documents() if isinstance(it, kind)}


def secrets() -> dict[str, set[str]]:
    """Those that kuberay.yaml's head says how to make, and the keys of each."""
    head = (DEPLOY / "kuberay.yaml").read_text().partition("\n---\n")[0].replace("|\n#    ", "|")
    lines = [line for line in head.splitlines() if line.startswith("#   printf ")]
    return {line.rpartition("secret ")[2]: set(re.findall(r"([A-Z_]+)=", line)) for line in lines}


def pods() -> Iterator[tuple[str, PodTemplate]]:
    """Every pod that the files make, by what makes it."""
    for it in documents():
        if isinstance(it, StatefulSet | Job):
            yield it.metadata.name, it.spec.template
        elif isinstance(it, RayService):
            yield from ray_pods(it)


def ray_pods(service: RayService) -> Iterator[tuple[str, PodTemplate]]:
    yield "head", service.spec.ray_cluster_config.head_group_spec.template
    for group in service.spec.ray_cluster_config.worker_group_specs:
        yield group.group_name, group.template
