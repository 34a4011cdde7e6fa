"""The composition root: the builders that `deployments.yaml` names, and the one place that names every deployment.

One application for the ingress and one for each model: Serve restarts what shares an application, so a model that is
added, changed or removed leaves the others' processes alone.
"""

# No `from __future__ import annotations`: Serve validates `args` against the builder's annotation if it is a type.
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from serve_app.core.catalog import ModelSpec, deployment_name
from serve_app.core.settings import IngressSettings
from serve_app.deployments.encoder import MAX_UNITS_AT_A_REPLICA, EncoderReplica
from serve_app.deployments.ingress import IngressReplica

_ingress: Any = serve.deployment(serve.ingress()(IngressReplica))
_encoder: Any = serve.deployment(EncoderReplica)

# Set before the process starts, or not at all: glibc keeps freed memory in per-thread arenas otherwise, and returns and
# faults in the same pages for every batch (a third of the system time was left).
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "536870912"}
# OpenMP's threads spin at every barrier otherwise: once another process wants a core, that cost two to three times the
# CPU seconds for a text, and nothing was faster on a quiet machine.
_OPENMP = {"GOMP_SPINCOUNT": "1000"}
ENCODER_ENV = {**_MALLOC, **_OPENMP, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
INGRESS_ENV = {"TOKENIZERS_PARALLELISM": "false"}  # the ingress has its own threads, and turns


def ingress(settings: IngressSettings) -> Application:
    """The HTTP side. Its application is the only one with a `route_prefix`."""
    application: Application = _ingress.options(
        name="ingress",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        ray_actor_options={"num_cpus": settings.num_cpus, "runtime_env": {"env_vars": INGRESS_ENV}},
    ).bind(settings)
    return application


def model(spec: ModelSpec) -> Application:
    """One model's replica group. Its application has `route_prefix: null`: requests reach it through the ingress."""
    scaling = AutoscalingConfig(
        min_replicas=spec.replicas.min,
        initial_replicas=None if spec.replicas.min else 1,  # one loads even of a model that may sleep, to be checked
        max_replicas=spec.replicas.max,
        target_ongoing_requests=spec.replicas.target_units,
        upscale_delay_s=spec.replicas.upscale_delay_s,
        downscale_delay_s=spec.replicas.downscale_delay_s,
    )
    application: Application = _encoder.options(
        name=deployment_name(spec),
        autoscaling_config=scaling,
        max_ongoing_requests=MAX_UNITS_AT_A_REPLICA,
        ray_actor_options={
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "runtime_env": {"env_vars": ENCODER_ENV},
        },
    ).bind(spec)
    return application
