"""Spans of the requests that are traced, in whichever process a part of them runs. While tracing is off: nothing.

Where a span belongs is told by a `traceparent` (W3C Trace Context). It flows along a request's own tasks by itself; to
other processes, and into work done for many requests at once, it is handed on, and only of requests that are traced.
The context that Serve keeps for its own spans is not used: a batch belongs to no single request. No span has words of
a request or of an exception. `deployments/tracing.py` brings what records them.
"""

from __future__ import annotations

import uuid
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

Fact = str | bool | int | float
T = TypeVar("T")


class Span(Protocol):
    """One that is recorded."""

    @property
    def traceparent(self) -> str:
        """Of those that go below it."""
        ...

    def rename(self, name: str) -> None: ...

    def tell(self, facts: Mapping[str, Fact | None]) -> None:
        """By their full names; None is left out."""
        ...

    def fail(self, kind: str) -> None:
        """kind: a code, or the name of an exception's type; never what it says."""
        ...

    def end(self) -> None: ...


class Tracer(Protocol):
    def start(self, name: str, parent: str | None, *, serves: bool = False, ago_s: float = 0.0) -> Span | None:
        """None if it is not sampled. parent: a traceparent; without one a trace begins.

        serves: a request from outside. ago_s: how long ago it began.
        """
        ...


_tracer: Tracer | None = None
_here: ContextVar[str | None] = ContextVar("traceparent", default=None)
NO_SPAN: AbstractContextManager[None] = nullcontext()
NO_SPANS: AbstractContextManager[tuple[str, ...]] = nullcontext(())


def switch_on(tracer: Tracer | None) -> None:
    """For this process. None: off again."""
    global _tracer
    _tracer = tracer


def here() -> str | None:
    """The traceparent of what is under way; None if it is not traced."""
    return _here.get()


def serving(headers: Mapping[str, str]) -> AbstractContextManager[Span | None]:
    """Around a request from outside, with the headers it came with. Whoever sent a `traceparent` has decided."""
    if _tracer is None:
        return NO_SPAN
    span = _tracer.start("request", headers.get("traceparent"), serves=True)
    return NO_SPAN if span is None else _under_way(span)


def span(name: str, parent: str | None = None, **facts: Fact) -> AbstractContextManager[Span | None]:
    """Around a step. parent: where it belongs, if that was handed on from elsewhere."""
    parent = parent or _here.get()
    if parent is None or _tracer is None:
        return NO_SPAN
    started = _tracer.start(name, parent)
    if started is None:
        return NO_SPAN
    started.tell(_named(facts))
    return _under_way(started)


def spans(name: str, parents: Sequence[str], **facts: Fact) -> AbstractContextManager[tuple[str, ...]]:
    """Around a step that is taken once for several requests: a span in the trace of each, all with the same `batch`.

    Gives the traceparents of what goes below them, to be handed on.
    """
    if not parents or _tracer is None:
        return NO_SPANS
    started = [one for parent in parents if (one := _tracer.start(name, parent)) is not None]
    named = _named({"batch": uuid.uuid4().hex, **facts})
    for one in started:
        one.tell(named)
    return _together(started)


def past(name: str, parent: str | None, seconds: float) -> None:
    """A span that ends now and began so long ago."""
    if parent is not None and _tracer is not None and (started := _tracer.start(name, parent, ago_s=seconds)):
        started.end()


def carry(work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """The same work, as a part of the request that is under way now, in whatever context it runs."""
    parent = _here.get()
    return work if parent is None else _below(parent, work)


async def _below(parent: str, work: Coroutine[Any, Any, T]) -> T:
    token = _here.set(parent)
    try:
        return await work
    finally:
        _here.reset(token)


@contextmanager
def _under_way(span: Span) -> Iterator[Span]:
    token = _here.set(span.traceparent)
    try:
        yield span
    except BaseException as error:
        span.fail(type(error).__name__)
        raise
    finally:
        _here.reset(token)
        span.end()


@contextmanager
def _together(started: Sequence[Span]) -> Iterator[tuple[str, ...]]:
    try:
        yield tuple(span.traceparent for span in started)
    except BaseException as error:
        for span in started:
            span.fail(type(error).__name__)
        raise
    finally:
        for span in started:
            span.end()


def _named(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {f"serve_app.{name}": fact for name, fact in facts.items()}
