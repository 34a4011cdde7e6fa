"""What the builders hand to Serve: nothing is started."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app import app
from serve_app.core.catalog import ModelSpec
from serve_app.core.settings import IngressSettings

ENTRY = {"id": "bge-m3", "source": "/models/BAAI/bge-m3", "num_gpus": 0.5}


def built(**entry: Any) -> Any:
    return app.model(ModelSpec.model_validate(ENTRY | entry))._bound_deployment


@pytest.mark.parametrize("most", [1, 100])
def test_a_model_has_no_more_replicas_on_a_node_than_its_entry_says(most: int) -> None:
    assert built(max_replicas_per_node=most)._replica_config.max_replicas_per_node == most


def test_unless_an_entry_says_so_a_node_takes_as_many_as_fit() -> None:
    assert built()._replica_config.max_replicas_per_node is None


def test_a_model_that_may_sleep_starts_with_one_replica_to_be_checked() -> None:
    scaling = built(replicas={"min": 0, "max": 2})._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 2)


def test_what_waits_in_serve_for_an_ingress_has_an_end() -> None:
    config = app.ingress(IngressSettings(max_ongoing_requests=7))._bound_deployment._deployment_config
    assert (config.max_ongoing_requests, config.max_queued_requests) == (7, 7)
    assert (config.backpressure_config.status_code, config.backpressure_config.retry_after_s) == (503, 1.0)
