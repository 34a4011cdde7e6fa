"""deploy/Dockerfile, without building it: what it copies, which versions it takes, whose process it starts."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass

import pytest

from serve_app.cli.checks import HAPROXY, HAPROXY_PATH, RAY_SETTINGS
from tests.deploy.kuberay import RayService
from tests.deploy.manifests import DEPLOY, ROOT, of_kind, pods

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
)
IMAGE = re.compile(r"registry\.example\.com/serve-app:(\S+)-(cpu|cuda)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    name: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(name=line.split()[0], text=line.partition(" ")[2].strip()) for line in joined if line.strip()]


def of(name: str) -> list[str]:
    return [it.text for it in instructions() if it.name == name]


def copied() -> set[str]:
    return {source for text in of("COPY") for source in text.split()[:-1]}


def test_what_it_copies_is_there_and_is_all_that_the_builder_is_shown() -> None:
    assert all((ROOT / source).exists() for source in copied())
    first, *rest = [it for it in (ROOT / ".dockerignore").read_text().splitlines() if it[0] != "#"]
    assert first == "*"
    assert {it[1:] for it in rest if it[0] == "!"} == copied()
    assert [it for it in rest if it[0] != "!"] == ["**/__pycache__"]


def test_every_package_is_at_the_version_that_was_tested() -> None:
    installs = [it for it in of("RUN") if "pip install" in it]
    assert len(installs) == 2
    assert all("pip install --constraint constraints.txt " in it for it in installs)
    assert installs[0].endswith(" torch")
    assert CONSTRAINTS["torch"] == "2.13.0"


def test_tracing_can_be_switched_on_in_it() -> None:
    extras = PROJECT["optional-dependencies"]
    assert of("RUN")[-1].endswith('".[tracing]"')
    assert {re.split("[>=]", it)[0] for it in extras["tracing"]} <= CONSTRAINTS.keys()


def test_its_python_is_one_that_the_project_takes() -> None:
    (base,) = of("FROM")
    assert base == "python:3.11-slim-bookworm"
    assert PROJECT["requires-python"].startswith(">=3.11,")


def test_where_wheels_come_from_is_told_when_it_is_built() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert of("ARG") == ['TORCH_INDEX=""']
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in text
    assert "://" not in text


def test_no_secret_is_built_in() -> None:
    for text in [*of("ENV"), *of("ARG"), *copied()]:
        assert not re.search(r"secret|password|token|key|\.env|data", text, re.IGNORECASE)


def test_it_runs_as_the_user_that_the_pods_say() -> None:
    assert of("USER") == ["1000"]
    last = max(at for at, it in enumerate(instructions()) if it.name in ("RUN", "COPY"))
    assert [it.name for it in instructions()].index("USER") > last
    assert any("useradd --uid 1000 " in it for it in of("RUN"))
    users = {template.spec.security_context.run_as_user for owner, template in pods() if "redis" not in owner}
    assert users == {1000}


def test_its_command_is_a_process_that_gets_the_signals_and_its_config_is_there() -> None:
    (command,) = of("CMD")
    words = json.loads(command)
    assert words[:2] == ["serve-app", "run"]
    assert words[-1] in copied()
    assert of("ENTRYPOINT") == of("STOPSIGNAL") == []  # both this and KubeRay's `ray start` drain at SIGTERM


def test_it_has_the_variables_of_scripts_serve() -> None:
    pairs = dict(re.findall(r"(RAY\w+)=(\S+)", " ".join(of("ENV"))))
    path = {HAPROXY_PATH: f"/usr/local/bin/{HAPROXY}"}  # where the base image's pip puts commands
    assert pairs == {name: it[0] for name, it in RAY_SETTINGS.items()} | path


@pytest.mark.parametrize("file", ["Dockerfile", "kuberay.yaml", "kuberay-models.yaml", "cluster.yaml"])
def test_its_tag_is_the_projects_version_wherever_it_is_named(file: str) -> None:
    assert {version for version, _ in IMAGE.findall((DEPLOY / file).read_text())} == {PROJECT["version"]}


def test_kuberay_is_told_the_ray_that_is_in_it() -> None:
    (service,) = of_kind(RayService).values()
    assert service.spec.ray_cluster_config.ray_version == CONSTRAINTS["ray"]
    groups = {it.group_name: it.template for it in service.spec.ray_cluster_config.worker_group_specs}
    assert groups["gpu"].spec.containers[0].image.endswith("-cuda")
    assert groups["cpu"].spec.containers[0].image.endswith("-cpu")
