from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ReplicaState,
    ServeStatus,
)

from serve_app.core.catalog import ModelCard, ModelSpec, SizeClass, deployment_name
from serve_app.core.errors import AtCapacity, InternalError, ModelLoading, ModelNotFound, ServiceError
from serve_app.core.metrics import IngressMetrics
from serve_app.core.packing import ALONE, Packed
from serve_app.deployments.encoder import Description, OtherFingerprint
from serve_app.deployments.model import Ready, Threads
from serve_app.deployments.models import LiveModels
from serve_app.dispatch import Unit, UnitReply
from serve_app.recall import ENTRY_BYTES
from tests.service.fakes import bundled_tokenizer_json

RUNNING, DEPLOYING = ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING
SPEC = ModelSpec.model_validate({"id": "small", "name": "Org/Small", "source": "/models/small", "class": "small"})
CARD = ModelCard(
    id="small",
    name="Org/Small",
    size_class=SizeClass.SMALL,
    native_dimensions=4,
    other_dimensions=(),
    max_tokens=64,
    unit_tokens=256,
    dtype="float32",
    created=1,
    fingerprint="one",
)


def app(status: ApplicationStatus, replicas: int | None, *, at: float = 1.0) -> ApplicationStatusOverview:
    """An application of SPEC; replicas None = Serve tells no deployments, as while it rebuilds one."""
    detail: Any = DeploymentStatusOverview.__new__(DeploymentStatusOverview)
    object.__setattr__(detail, "replica_states", {ReplicaState.RUNNING: replicas or 0})
    deployments = {} if replicas is None else {deployment_name(SPEC): detail}
    return ApplicationStatusOverview(status=status, message="", last_deployed_time_s=at, deployments=deployments)


def status(**apps: ApplicationStatusOverview) -> ServeStatus:
    return ServeStatus(applications=apps)


class Handle:
    """Answers `describe` with a card, and `encode` with what is queued up for it."""

    def __init__(self, card: ModelCard) -> None:
        self.card, self.asked, self.outcomes = card, 0, list[Exception]()
        self.describe = self.encode = self
        self.hangs = False

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, unit: Unit | None = None) -> Any:
        return asyncio.ensure_future(self._describe() if unit is None else self._encode())

    async def _describe(self) -> Description:
        self.asked += 1
        return Description(card=self.card, tokenizer_json=bundled_tokenizer_json())

    async def _encode(self) -> UnitReply:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        raise self.outcomes.pop(0)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    handle = Handle(CARD)
    monkeypatch.setattr("ray.serve.get_app_handle", lambda _: handle)
    return handle


@pytest.fixture
def live(handle: Handle) -> LiveModels:
    return LiveModels(IngressMetrics(), max_pending_tokens=1000, max_workspace_tokens=1000, load_wait_s=10.0)


async def learn(live: LiveModels, **apps: ApplicationStatusOverview) -> None:
    live.learn(status(**apps))
    while others := asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}:
        await asyncio.wait(others)


def refusal(live: LiveModels, name: str) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        live.resolve(name)
    return refused.value


def test_before_serve_was_heard_a_model_is_loading_rather_than_unknown(live: LiveModels) -> None:
    assert isinstance(refusal(live, "small"), ModelLoading)


async def test_a_running_model_answers_to_both_its_names(live: LiveModels) -> None:
    await learn(live, a=app(RUNNING, 1))
    assert live.resolve("SMALL").card == live.resolve("org/small").card == CARD
    assert isinstance(refusal(live, "smal"), ModelNotFound)
    assert "Did you mean 'small'" in refusal(live, "smal").message


async def test_a_model_with_a_replica_answers_before_its_application_is_done(live: LiveModels) -> None:
    await learn(live, a=app(ApplicationStatus.UNHEALTHY, 2))
    assert live.resolve("small").card == CARD


async def test_a_loading_model_says_so_and_for_how_long(live: LiveModels, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("serve_app.deployments.models.time.monotonic", lambda: now[0])
    live.learn(status(a=app(DEPLOYING, 0)))
    now[0] += 8
    refused = refusal(live, "Org/Small")
    assert isinstance(refused, ModelLoading)
    assert refused.retry_after_s == 8
    assert live.states()["small"].state == "loading"


async def test_a_known_model_stays_while_serve_rebuilds_its_application(live: LiveModels) -> None:
    await learn(live, a=app(RUNNING, 2))
    for state in (DEPLOYING, ApplicationStatus.DEPLOY_FAILED):
        await learn(live, a=app(state, None, at=2.0))
        assert live.resolve("small").card == CARD
        assert live.states()["small"].state == "ready"


async def test_a_deleted_model_is_unknown_at_once(live: LiveModels) -> None:
    await learn(live, a=app(RUNNING, 1))
    await learn(live, a=app(ApplicationStatus.DELETING, 1))
    assert isinstance(refusal(live, "small"), ModelNotFound)
    assert live.states() == {}


async def test_a_request_under_way_may_finish_while_its_model_leaves_and_is_told_when_it_has_left(
    live: LiveModels, handle: Handle
) -> None:
    await learn(live, a=app(RUNNING, 1))
    handle.hangs = True
    model = live.resolve("small")
    asked = asyncio.create_task(model.encode((await model.tokenize(["hello"])).packed, ALONE, no_store=False))
    live.learn(status(a=app(ApplicationStatus.DELETING, 1)))
    await asyncio.sleep(0.01)
    assert not asked.done()
    live.learn(status())
    with pytest.raises(ModelNotFound):
        await asked


async def test_applications_without_an_encoder_are_none_of_its_business(live: LiveModels) -> None:
    other = app(RUNNING, 1)
    other.deployments["ingress"] = other.deployments.pop(deployment_name(SPEC))
    await learn(live, ingress=other, broken=app(ApplicationStatus.DEPLOY_FAILED, None))
    assert live.states() == {}


async def test_a_card_is_asked_for_again_only_after_a_change(live: LiveModels, handle: Handle) -> None:
    for _ in range(3):
        await learn(live, a=app(RUNNING, 1))
    assert handle.asked == 1
    first = live.resolve("small")
    await learn(live, a=app(RUNNING, 1, at=2.0))
    assert handle.asked == 2
    assert live.resolve("small") is first  # the same card: its queue goes on


@pytest.mark.parametrize("change", [{"size_class": SizeClass.XL}, {"other_dimensions": (2,)}, {"fingerprint": "two"}])
async def test_a_changed_card_takes_the_place_of_the_old(
    live: LiveModels, handle: Handle, change: dict[str, Any]
) -> None:
    await learn(live, a=app(RUNNING, 1))
    await learn(live, a=app(DEPLOYING, 1, at=2.0))  # an old replica answers still
    handle.card = replace(CARD, **change)
    await learn(live, a=app(RUNNING, 1, at=2.0))
    assert live.resolve("small").card == handle.card


async def test_a_sleeping_model_is_woken_by_a_request(live: LiveModels, handle: Handle) -> None:
    await learn(live, a=app(RUNNING, 0))
    assert live.states()["small"].state == "asleep"
    assert handle.asked == 0
    assert isinstance(refusal(live, "small"), ModelLoading)
    assert handle.asked == 0  # to be looked at wakes nothing
    assert (await live.awake("small")).card == CARD
    assert live.states()["small"].state == "ready"


async def test_a_model_that_fell_asleep_is_woken_and_waited_for(live: LiveModels, handle: Handle) -> None:
    await learn(live, a=app(RUNNING, 1))
    await learn(live, a=app(RUNNING, 0))
    asked = handle.asked
    assert (await live.awake("small")).card == CARD
    assert handle.asked == asked + 1  # a call is what makes Serve start a replica


async def test_a_loading_model_is_waited_for(live: LiveModels) -> None:
    live.learn(status(a=app(DEPLOYING, 0)))
    waiting = asyncio.ensure_future(live.awake("small"))
    await asyncio.sleep(0)
    live.learn(status(a=app(DEPLOYING, 0)))
    await asyncio.sleep(0)
    assert not waiting.done()
    live.learn(status(a=app(RUNNING, 1)))
    assert (await waiting).card == CARD


async def test_who_has_waited_long_enough_is_told_how_long_it_will_take(live: LiveModels) -> None:
    live._load_wait_s = 0.05
    live.learn(status(a=app(DEPLOYING, 0)))
    live._names["small"].loading_since_s = time.monotonic() - 8
    with pytest.raises(ModelLoading) as refused:
        await live.awake("small")
    assert refused.value.retry_after_s == pytest.approx(8, abs=1)


async def test_a_model_that_is_known_to_take_longer_than_one_waits_is_woken_and_refused_at_once(
    live: LiveModels, handle: Handle
) -> None:
    await learn(live, a=app(RUNNING, 1))
    await learn(live, a=app(RUNNING, 0))
    live._load_s["small"] = 45.0
    asked, started_s = handle.asked, time.monotonic()
    with pytest.raises(ModelLoading) as refused:
        await live.awake("small")
    assert time.monotonic() - started_s < live._load_wait_s / 2
    assert refused.value.retry_after_s == pytest.approx(45, abs=1)
    await learn(live, a=app(RUNNING, 0))
    assert handle.asked == asked + 1


async def test_nobody_waits_for_a_model_that_failed_to_start(live: LiveModels) -> None:
    live.learn(status(a=app(ApplicationStatus.DEPLOY_FAILED, 0)))
    with pytest.raises(ModelLoading, match="failed to start"):
        await live.awake("small")


async def test_who_waits_for_a_model_that_goes_is_told(live: LiveModels) -> None:
    live.learn(status(a=app(DEPLOYING, 0)))
    waiting = asyncio.ensure_future(live.awake("small"))
    await asyncio.sleep(0)
    live.learn(status())
    with pytest.raises(ModelNotFound):
        await waiting


async def test_of_two_applications_with_one_name_the_first_serves(live: LiveModels) -> None:
    await learn(live, b=app(RUNNING, 1), a=app(RUNNING, 1))
    await learn(live, b=app(RUNNING, 1))
    assert live.resolve("small").card == CARD


def ready(handle: Handle, *, deployed: bool) -> Ready:
    async def is_deployed() -> bool:
        return deployed

    description = Description(card=CARD, tokenizer_json=bundled_tokenizer_json())
    stand_in = cast(DeploymentHandle, handle)
    return Ready(
        stand_in,
        description,
        Threads(),
        is_deployed=is_deployed,
        max_pending_tokens=1000,
        max_workspace_tokens=1000,
        metrics=IngressMetrics(),
    )


@pytest.mark.parametrize(
    ("outcomes", "deployed", "error"),
    [
        ([RayActorError(), RayActorError()], True, InternalError),
        ([OtherFingerprint("two"), OtherFingerprint("two")], True, ModelLoading),
        ([RayActorError(), OtherFingerprint("two")], True, ModelLoading),
        ([BackPressureError(9, 8)], True, AtCapacity),
        ([DeploymentUnavailableError.__new__(DeploymentUnavailableError)], True, ModelLoading),
        ([DeploymentUnavailableError.__new__(DeploymentUnavailableError)], False, ModelNotFound),
    ],
)
async def test_what_a_replica_could_not_do_has_its_own_answer(
    handle: Handle, outcomes: list[Exception], deployed: bool, error: type[ServiceError]
) -> None:
    handle.outcomes = [*outcomes, AssertionError("asked once too often")]
    model = ready(handle, deployed=deployed)
    with pytest.raises(error):
        await model.encode(Packed.join([(await model.tokenize(["hello"])).packed]), ALONE, no_store=False)
    assert handle.asked == len(outcomes)


async def test_what_a_model_keeps_is_told_and_is_nothing_once_it_goes_or_is_replaced(
    live: LiveModels, handle: Handle
) -> None:
    def told() -> dict[tuple[str, ...], float]:
        live.measure()
        return {labels: value for _, labels, value in live._metrics.cache_bytes.take()}

    async def answered(unit: Unit) -> UnitReply:
        return UnitReply(vectors=np.ones((len(unit.packed.lengths), 4), np.float32), compute_s=0.0)

    handle.card = replace(CARD, cache_bytes=10_000)
    await learn(live, a=app(RUNNING, 1))
    assert told() == {(CARD.name,): 0}
    model = live.resolve("small")
    assert isinstance(model, Ready)
    model.dispatcher._send = answered
    await model.encode((await model.tokenize(["hello", "there"])).packed, ALONE, no_store=False)
    assert told() == {(CARD.name,): 2 * (4 * 4 + ENTRY_BYTES)}
    handle.card = replace(CARD, cache_bytes=20_000)
    await learn(live, a=app(RUNNING, 1, at=2.0))
    successor = live.resolve("small")
    assert isinstance(successor, Ready)
    assert successor is not model
    assert told() == {(CARD.name,): 0}
    successor.dispatcher._send = answered
    await successor.encode((await model.tokenize(["hello"])).packed, ALONE, no_store=False)
    assert told() == {(CARD.name,): 4 * 4 + ENTRY_BYTES}
    live.learn(status())
    assert told() == {(CARD.name,): 0}
