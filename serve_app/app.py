"""The composition root: the builders that `deployments.yaml` names, and the one place that names every deployment.

One application for the ingress, for each of the two actors, and for each model: Serve restarts what shares an
application, so a model that is added, changed or removed leaves the others' processes alone.
"""

# No `from __future__ import annotations`: Serve validates `args` against the builder's annotation if it is a type.
import os
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve_app.core import scaling
from serve_app.core.catalog import ModelSpec, deployment_name
from serve_app.core.settings import IdempotencySettings, IngressSettings, StoreSettings
from serve_app.deployments.encoder import MAX_UNITS_AT_A_REPLICA, EncoderReplica
from serve_app.deployments.idempotency import IdempotencyReplica, shard_name
from serve_app.deployments.ingress import IngressReplica
from serve_app.deployments.usage import UsageReplica
from serve_app.sinks.settings import UsageSettings
from serve_app.stores import DEFAULT_URL, is_local
from serve_app.stores.sqlite import path_of

_ingress: Any = serve.deployment(serve.ingress()(IngressReplica))
_encoder: Any = serve.deployment(EncoderReplica)
_idempotency: Any = serve.deployment(IdempotencyReplica)
_usage: Any = serve.deployment(UsageReplica)

# Set before the process starts, or not at all: glibc keeps freed memory in per-thread arenas otherwise, and returns and
# faults in the same pages for every batch (a third of the system time was left).
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "536870912"}
# OpenMP's threads spin at every barrier otherwise: once another process wants a core, that cost two to three times the
# CPU seconds for a text, and nothing was faster on a quiet machine.
_OPENMP = {"GOMP_SPINCOUNT": "1000"}
ENCODER_ENV = {**_MALLOC, **_OPENMP, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
LOOK_BACK_S = 15.0  # of what replicas measured, the mean: a burst of a second starts nothing
INGRESS_ENV = {"TOKENIZERS_PARALLELISM": "false"}  # the ingress has its own threads, and turns
DEFAULT_TERMS: dict[str, Any] = {}  # not None: Serve would not tell a replica that its `user_config` is gone again


Settings = TypeVar("Settings", bound=StoreSettings)


def _located(settings: Settings) -> Settings:
    """With a store and a folder that mean the same in every process: where nothing is said, or a relative path."""
    store = settings.store or os.environ.get("SERVE_APP_STORE") or DEFAULT_URL
    blobs = Path(settings.blobs or "data/blobs")
    if is_local(store):
        store = f"sqlite:{path_of(store)}"
        blobs = Path(settings.blobs) if settings.blobs else path_of(store).with_name("blobs")
    return settings.model_copy(update={"store": store, "blobs": str(blobs.expanduser().absolute())})


def _actor(num_cpus: float) -> dict[str, Any]:
    """Back soon: Serve looks after it every second. It may hold thousands of duplicates that wait."""
    return {
        "num_replicas": 1,
        "max_ongoing_requests": 10_000,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": {"num_cpus": num_cpus},
    }


def ingress(settings: IngressSettings) -> Application:
    """The HTTP side. Its application is the only one with a `route_prefix`."""
    settings = _located(settings)
    application: Application = _ingress.options(
        name="ingress",
        num_replicas=settings.replicas,
        user_config=DEFAULT_TERMS,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 10.0,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_ongoing_requests,  # these wait in Serve, before anything of ours sees them
        backpressure_config={"status_code": 503, "retry_after_s": 1.0},
        ray_actor_options={"num_cpus": settings.num_cpus, "runtime_env": {"env_vars": INGRESS_ENV}},
    ).bind(settings)
    return application


def idempotency(settings: IdempotencySettings) -> Application:
    """The idempotency actor, one process for each shard. `route_prefix: null`."""
    settings = _located(settings)
    root, *others = [
        _idempotency.options(name=shard_name(shard, settings.shards), **_actor(settings.num_cpus))
        for shard in range(settings.shards)
    ]
    bound = [other.bind(settings, shard, []) for shard, other in enumerate(others, start=1)]
    application: Application = root.bind(settings, 0, bound)  # an application has one root, and what that is bound to
    return application


def usage(settings: UsageSettings) -> Application:
    """The usage actor: one process. `route_prefix: null`."""
    settings = _located(settings)
    application: Application = _usage.options(
        name="usage", user_config=DEFAULT_TERMS, **_actor(settings.num_cpus)
    ).bind(settings)
    return application


def model(spec: ModelSpec) -> Application:
    """One model's replica group. Its application has `route_prefix: null`: requests reach it through the ingress."""
    if spec.self_tests is not None:
        spec = spec.model_copy(update={"self_tests": str(Path(spec.self_tests).expanduser().absolute())})
    autoscaling = AutoscalingConfig(
        min_replicas=spec.replicas.min,
        initial_replicas=None if spec.replicas.min else 1,  # one loads even of a model that may sleep, to be checked
        max_replicas=spec.replicas.max,
        look_back_period_s=LOOK_BACK_S,
        policy=AutoscalingPolicy(
            policy_function=f"{scaling.__name__}.{scaling.ByTokens.__name__}",
            policy_kwargs={"target_busy": spec.replicas.target_busy, "target_queue_s": spec.replicas.target_queue_s},
        ),
        upscale_delay_s=spec.replicas.upscale_delay_s,
        downscale_delay_s=spec.replicas.downscale_delay_s,
    )
    application: Application = _encoder.options(
        name=deployment_name(spec),
        autoscaling_config=autoscaling,
        max_ongoing_requests=MAX_UNITS_AT_A_REPLICA,
        max_replicas_per_node=spec.max_replicas_per_node,
        ray_actor_options={
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "runtime_env": {"env_vars": ENCODER_ENV},
        },
    ).bind(spec)
    return application
