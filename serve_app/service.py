"""One request, top to bottom: the file to read first.

Every step is a call that returns a value or raises an error of `core/errors.py`; nobody calls back up. `api.py` above
it speaks HTTP; below it are the live models (`Models`, filled in by `deployments/`), the accounts and the books.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve_app import tracing
from serve_app.accounts import Accounts, Caller
from serve_app.apart import apart
from serve_app.books import Books, Claim
from serve_app.core import idempotency, ledger, ranking, schema, vectors
from serve_app.core.catalog import (
    ModelCard,
    check_dimensions,
    check_documents,
    check_strings,
    check_task,
    check_tokens,
)
from serve_app.core.charges import token_event
from serve_app.core.errors import (
    AtCapacity,
    EndpointNotAllowed,
    ModelNotAllowed,
    ModelNotFound,
    RequestTimeout,
    ServiceError,
    did_you_mean,
    shown,
)
from serve_app.core.known import Task
from serve_app.core.ledger import UsageEvent, call_event_id
from serve_app.core.metrics import lane_name
from serve_app.core.packing import Packed, Share
from serve_app.core.prompts import InputType, parted, prompt_for, prompted
from serve_app.core.replies import Reply
from serve_app.core.settings import Terms
from serve_app.core.truncation import Tokenized
from serve_app.dispatch import Encoded
from serve_app.pulse import Pulse
from serve_app.stores import Clock
from serve_app.throttle import Standing, Throttle

WARNING_BYTES = 80  # of a stored reply, for each input that was cut
MODELS = "/v1/models"  # never counted against a rate
LEAVING_S = 5.0  # what a restart takes is not known here: whoever asks again then meets another instance, or nobody


_PROCESS, _numbers = uuid.uuid4().hex, itertools.count()  # a uuid for each call was a twentieth of an ingress


class LiveModel(Protocol):
    """A model that answers."""

    @property
    def card(self) -> ModelCard: ...

    async def tokenize(self, texts: Sequence[str]) -> Tokenized: ...

    async def tokenize_pairs(self, query: str, documents: Sequence[str], max_document_tokens: int | None) -> Tokenized:
        """The query before each document. Raises TooManyTokens if it leaves them no room."""
        ...

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded: ...


class Models(Protocol):
    """The models that are deployed right now."""

    def names(self, name: str) -> tuple[str, str]:
        """(id, canonical name) of a deployed model, by either, in any case. Raises ModelNotFound or ModelLoading."""
        ...

    def resolve(self, name: str) -> LiveModel:
        """A model that has answered before. Raises ModelNotFound or ModelLoading."""
        ...

    async def awake(self, name: str) -> LiveModel:
        """One that answers now: waits for a model that loads, and wakes one that sleeps. Raises as `resolve`."""
        ...

    def cards(self) -> list[ModelCard]:
        """Of all models that answer."""
        ...

    def states(self) -> dict[str, schema.ModelState]:
        """Of all models that are deployed, by id."""
        ...


@dataclass(slots=True, kw_only=True)
class Call:
    """What is known of one HTTP request so far: its response headers tell it, whether it succeeds or fails."""

    request_id: str
    started_s: float
    route: str
    id: str = field(default_factory=lambda: f"{_PROCESS}-{next(_numbers)}")  # ours: a caller may repeat a request id
    idempotency_keys: Sequence[str] = field(default=(), repr=False)
    read_timeout_s: float = math.inf  # after which the client hangs up, as it said
    no_store: bool = False  # its vectors are neither taken from a cache nor kept in one
    caller: Caller | None = None
    model: str = ""  # its canonical name
    fingerprint: str | None = None
    replay_of: str | None = None  # the request id of the call that this one repeats
    tokenize_s: float | None = None
    queue_s: float | None = None
    compute_s: float | None = None
    settle_s: float | None = None
    inputs: int | None = None
    tokens: int | None = None
    express: bool | None = None  # the lane that it took, if it took any
    error: ServiceError | None = field(default=None, repr=False)  # what it was answered with


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that can be run: its model answers, and it is within the limits that need no tokens to be counted."""

    caller: Caller
    request: schema.EmbeddingsRequest | schema.RerankRequest
    model: LiveModel
    inputs: int
    inputs_field: str  # where they stand in the request
    dimensions: int  # of an input's row: 1 if it is a score
    encoding_format: Literal["float", "base64"] = "float"
    tokenize: Callable[[], Awaitable[Tokenized]] = field(repr=False)
    render: Callable[[Reply], bytes] = field(repr=False)


class Service:
    def __init__(
        self,
        models: Models,
        accounts: Accounts,
        throttle: Throttle,
        books: Books,
        terms: Terms,
        *,
        now_ms: Clock,
        request_timeout_s: float,
        pulse: Pulse,
    ) -> None:
        self._models = models
        self._accounts = accounts
        self._throttle = throttle
        self._books = books
        self._terms = terms
        self._now_ms = now_ms
        self._request_timeout_s = request_timeout_s
        self._pulse = pulse
        self._leaving = False

    def change(self, terms: Terms) -> None:
        """From now on: requests already admitted have the new rates, too, for each is billed when it is answered."""
        self._terms = terms
        self._throttle.change(terms.limits)

    @asynccontextmanager
    async def deadline(self, client_s: float = math.inf) -> AsyncIterator[None]:
        """Around a whole request, its body's arrival included. Raises RequestTimeout; what was begun is dropped.

        client_s: what its client waits, if that is less.
        """
        within_s = min(self._request_timeout_s, client_s)
        try:
            async with asyncio.timeout(within_s):
                yield
        except TimeoutError:
            raise RequestTimeout(f"No answer within {within_s:g} s; the work was dropped.") from None

    async def admit(self, call: Call, authorization: str | None) -> None:
        """Who is calling, and whether it may now.

        Raises InvalidAPIKey, EndpointNotAllowed, RateLimitExceeded, and AtCapacity while this process falls behind, or
        once nothing is admitted any more.
        """
        with tracing.span("admit"):
            self._pulse.check()
            call.caller = await self._accounts.authenticate(authorization)
            if self._leaving:
                raise AtCapacity("The service is shutting down.", retry_after_s=LEAVING_S)
            if not call.caller.key.may_call(call.route):
                raise EndpointNotAllowed("This API key may not call this endpoint.")
            if call.route == MODELS or call.route.startswith(f"{MODELS}/"):
                await self._throttle.look(call.caller)
            else:
                await self._throttle.admit(call.caller)

    def leave(self) -> None:
        """From now on nothing is admitted, and it is not ready."""
        self._leaving = True

    def standing(self, call: Call) -> tuple[Standing, Standing | None] | None:
        """What is left of the caller's budgets, requests and tokens; None for a call without a caller."""
        return None if call.caller is None else self._throttle.standing(call.caller)

    async def close(self) -> None:
        """Before the store is closed."""
        await self._accounts.close()
        await self._throttle.close()

    async def embed(self, call: Call, body: bytes) -> bytes:
        """`POST /v1/embeddings`: the response's body."""
        return await self._answer(call, await self._embedding(call, body))

    async def rerank(self, call: Call, body: bytes) -> bytes:
        """`POST /v1/rerank`: the response's body."""
        return await self._answer(call, await self._reranking(call, body))

    async def _embedding(self, call: Call, body: bytes) -> Job:
        request = schema.parse(schema.EmbeddingsRequest, body)
        model, prompt = await self._asked(call, request)
        dimensions = check_dimensions(model.card, request.dimensions)
        check_strings(model.card, len(request.input))
        return Job(
            caller=_caller(call),
            request=request,
            model=model,
            inputs=len(request.input),
            inputs_field="input",
            dimensions=dimensions,
            encoding_format=request.encoding_format,
            tokenize=lambda: model.tokenize(prompted(request.input, prompt)),
            render=Reply.render,
        )

    async def _reranking(self, call: Call, body: bytes) -> Job:
        request = schema.parse(schema.RerankRequest, body)
        model, documents = await self._reranker(call, request), request.ranked
        return Job(
            caller=_caller(call),
            request=request,
            model=model,
            inputs=len(documents),
            inputs_field=request.ranked_field,
            dimensions=1,
            tokenize=lambda: _pairs(model, request),
            render=lambda reply: ranking.render(
                reply.vectors[:, 0],
                documents,
                model=reply.model,
                usage=reply.usage,
                top_n=request.top_n,
                texts=request.return_documents,
                cohere=request.documents is not None,
            ),
        )

    async def _answer(self, call: Call, job: Job) -> bytes:
        key = idempotency.parse_key(call.idempotency_keys)
        reply = await (self._run(call, job) if key is None else self._run_once(call, job, key))
        return job.render(reply)

    async def _run(self, call: Call, job: Job) -> Reply:
        """Without an Idempotency-Key: every success is a call of its own, and billed."""
        workspace = job.caller.workspace
        await self._books.check_cap(workspace, self._month())
        reply = await self._compute(call, job)
        bill = self._bill(call, job, reply, id=call_event_id(workspace.id, call.id))
        with _settling(call):
            await self._books.bill(workspace, bill)
        return reply

    async def _run_once(self, call: Call, job: Job, key: str) -> Reply:
        """With one: the first success is computed and billed, and for 24 hours it is the answer to every repetition."""
        canonical = schema.canonical(job.request)
        reply_bytes = (4 * job.dimensions + WARNING_BYTES) * job.inputs
        with tracing.span("claim"):
            claim = await self._books.begin(job.caller, call.route, key, canonical, reply_bytes)
        if isinstance(claim, Reply):
            call.replay_of, call.fingerprint = claim.request_id, claim.fingerprint
            return claim
        call.read_timeout_s = math.inf  # if the client hangs up, it comes again
        return await asyncio.shield(apart(tracing.carry(self._fulfil(call, job, claim))))

    async def _fulfil(self, call: Call, job: Job, claim: Claim) -> Reply:
        try:
            async with self.deadline():
                if claim.lost_blob is None:  # else it was billed before the cap was reached, and is not billed again
                    await self._books.check_cap(job.caller.workspace, self._month())
                reply = await self._compute(call, job)
                bill = self._bill(call, job, reply, id=claim.op, claim=claim.id)
                with _settling(call):
                    return await self._books.settle(job.caller.workspace, claim, reply, bill)
        except BaseException:
            self._books.release(claim)
            raise

    async def _compute(self, call: Call, job: Job) -> Reply:
        tokenized = await self._tokenize(call, job.tokenize())
        check_tokens(job.model.card, tokenized.packed.tokens, param=job.inputs_field)
        await self._throttle.spend(job.caller, tokenized.packed.tokens)
        encoded = await self._encode(call, job, tokenized)
        return Reply(
            vectors=vectors.cut(encoded.vectors, job.dimensions),
            model=job.model.card.name,
            usage=tokenized.usage(),
            encoding_format=job.encoding_format,
            fingerprint=job.model.card.fingerprint,
            request_id=call.request_id,
        )

    def _month(self) -> str:
        return ledger.month_of(ledger.day_of(self._now_ms()))

    def _bill(self, call: Call, job: Job, reply: Reply, *, id: str, claim: str | None = None) -> UsageEvent:
        return token_event(
            id=id,
            workspace=job.caller.workspace,
            key=job.caller.key,
            card=job.model.card,
            rates=self._terms.rates,
            tokens=reply.usage["total_tokens"],
            time_ms=self._now_ms(),
            details={
                "endpoint": call.route,
                "request_id": call.request_id,
                "inputs": job.inputs,
                "dimensions": job.dimensions,
                "model_fingerprint": reply.fingerprint,
                "user": job.request.user,
                "idempotency": claim,
            },
        )

    async def tokenize(self, call: Call, body: bytes) -> dict[str, Any]:
        """`POST /v1/tokenize`: the exact billable count, before sending."""
        request = schema.parse_tokenize(body)
        if isinstance(request, schema.TokenizePairsRequest):
            model = await self._reranker(call, request)
            tokenized = await self._tokenize(call, _pairs(model, request))
        else:
            model, prompt = await self._asked(call, request)
            check_strings(model.card, len(request.input))
            tokenized = await self._tokenize(call, model.tokenize(prompted(request.input, prompt)))
        counts, usage = tokenized.counts(), tokenized.usage()
        return {"object": "list", "data": counts, "model": model.card.name, "usage": usage}

    async def usage(self, call: Call, query: Mapping[str, str]) -> dict[str, Any]:
        """`GET /v1/usage`: what the caller's workspace used, from the ledger."""
        asked = schema.parse_usage_query(query, today=ledger.day_of(self._now_ms()))
        lines = await self._books.usage(_caller(call).workspace, asked.first_day, asked.last_day)
        return {
            "object": "usage",
            "workspace": _caller(call).workspace.id,
            "from": asked.first_day,
            "to": asked.last_day,
            "group_by": asked.group_by,
            "currency": "USD",
            "data": ledger.report(lines, asked.group_by),
            "total_amount_micros": ledger.total_micros(lines),
        }

    def list_models(self, call: Call) -> dict[str, Any]:
        """`GET /v1/models`: those that the key may use."""
        key = _caller(call).key
        allowed = [card for card in self._models.cards() if key.may_use(card.id, card.name)]
        return {"object": "list", "data": [_model(card, card.id) for card in allowed]}

    def retrieve_model(self, call: Call, name: str) -> dict[str, Any]:
        """`GET /v1/models/{id}`: answers under the name that was asked for."""
        id, input_type = self._named(call, name)
        card = self._models.resolve(id).card
        _check_suffix(card, name, input_type)
        call.fingerprint = card.fingerprint
        return _model(card, name)

    def readiness(self) -> dict[str, Any]:
        """`GET /ready`: ready = at least one model is deployed, and every one answered its self-test or sleeps."""
        states = self._models.states()
        ready = (
            bool(states) and not self._leaving and all(state.state in ("ready", "asleep") for state in states.values())
        )
        return {
            "status": "ready" if ready else "not_ready",
            "models": {id: state.model_dump() for id, state in states.items()},
        }

    async def _asked(
        self, call: Call, request: schema.EmbeddingsRequest | schema.TokenizeRequest
    ) -> tuple[LiveModel, str | None]:
        """The model that is meant, and the prompt that goes before each text."""
        model, by_name = await self._awake(call, request.model)
        card = model.card
        check_task(card, Task.EMBED)
        return model, prompt_for(card.prompts, by_name=by_name, by_field=request.input_type, model=card.name)

    async def _reranker(self, call: Call, request: schema.RerankRequest | schema.TokenizePairsRequest) -> LiveModel:
        model, _ = await self._awake(call, request.model)
        check_task(model.card, Task.RERANK)
        check_documents(model.card, len(request.ranked), param=request.ranked_field)
        return model

    async def _awake(self, call: Call, name: str) -> tuple[LiveModel, InputType | None]:
        """The model of that name, which answers, and what the name's suffix says of the texts."""
        id, input_type = self._named(call, name)
        model = await self._models.awake(id)
        _check_suffix(model.card, name, input_type)
        call.model, call.fingerprint = model.card.name, model.card.fingerprint
        return model, input_type

    def _named(self, call: Call, name: str) -> tuple[str, InputType | None]:
        """The id that is meant, and what the suffix says, if that is no model's own name. A key wakes only its own."""
        input_type = None
        try:
            id, canonical = self._models.names(name)
        except ModelNotFound:
            split = parted(name)
            if split is None:
                raise
            id, canonical = self._models.names(split[0])
            input_type = split[1]
        if not _caller(call).key.may_use(id, canonical):
            raise ModelNotAllowed(f"This API key may not use the model {canonical}.", param="model")
        return id, input_type

    async def _tokenize(self, call: Call, under_way: Awaitable[Tokenized]) -> Tokenized:
        started_s = time.perf_counter()
        with tracing.span("tokenize"):
            tokenized = await under_way
        call.tokenize_s = time.perf_counter() - started_s
        call.inputs, call.tokens = len(tokenized.packed.lengths), tokenized.packed.tokens
        return tokenized

    async def _encode(self, call: Call, job: Job, tokenized: Tokenized) -> Encoded:
        workspace = job.caller.workspace
        within_s = min(self._request_timeout_s, call.read_timeout_s) - (time.perf_counter() - call.started_s)
        share = Share(workspace=workspace.id, weight=self._terms.limits.weight(workspace.plan), within_s=within_s)
        with tracing.span("encode") as span:
            encoded = await job.model.encode(tokenized.packed, share, no_store=call.no_store)
            if span is not None and encoded.express is not None:
                span.tell({"serve_app.lane": lane_name(encoded.express)})
        call.queue_s, call.compute_s, call.express = encoded.queue_s, encoded.compute_s, encoded.express
        return encoded


@contextmanager
def _settling(call: Call) -> Iterator[None]:
    started_s = time.perf_counter()
    with tracing.span("settle"):
        yield
    call.settle_s = time.perf_counter() - started_s


def _caller(call: Call) -> Caller:
    assert call.caller is not None, "an open route needs no caller, and no other is reached without one"
    return call.caller


def _check_suffix(card: ModelCard, name: str, input_type: InputType | None) -> None:
    """Raises ModelNotFound if the name has one and the model has no prompts."""
    if input_type is not None and card.prompts is None:
        raise ModelNotFound(f"There is no model {shown(name)} here.{did_you_mean(card.id)}", param="model")


def _pairs(model: LiveModel, request: schema.RerankRequest | schema.TokenizePairsRequest) -> Awaitable[Tokenized]:
    texts = [document.text for document in request.ranked]
    return model.tokenize_pairs(request.query, texts, request.max_tokens_per_doc)


def _model(card: ModelCard, id: str) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": card.created,
        "owned_by": card.name.partition("/")[0],
        "canonical_name": card.name,
        "task": card.task,
        "dimensions": card.native_dimensions if card.task is Task.EMBED else None,
        "max_tokens": card.max_tokens,
        "input_types": ["query", "document"] if card.prompts else [],
    }
