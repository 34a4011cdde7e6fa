"""Every error a caller can get: the tree from which the body, the headers and the README's table are made.

ServiceError
  + InvalidRequest (400)      - InvalidJSON, MissingRequiredField, UnknownParameter, UnsupportedParameter,
                                InvalidInput, TooManyInputs, TooManyTokens, InvalidIdempotencyKey
  + InvalidAPIKey (401)
  + PermissionDenied (403)    - EndpointNotAllowed, ModelNotAllowed, PlanLimitExceeded
  + NotFound (404)            - ModelNotFound, RouteNotFound
  + MethodNotAllowed (405), RequestTooLarge (413), UnsupportedMediaType (415)
  + Conflict (409)            - IdempotencyConflict, IdempotencyInProgress
  + RateLimitExceeded (429)
  + InternalError (500)
  + Unavailable (503)         - ModelLoading, AtCapacity, StoreUnavailable
  + RequestTimeout (504)

A message says what was wrong and what would be right, and never holds a caller's text: `shown` decides what may be
repeated. `api.py` turns these into HTTP.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

MAX_RETRY_AFTER_S = 120  # the OpenAI SDK gives up at once when it is told to wait longer
Budget = Literal["requests", "tokens", "replays", "spend"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}(/[A-Za-z0-9_.\-]{1,64})?")


class ServiceError(Exception):
    """What the caller is told. `advice` is the README's sentence: what the caller can do about it."""

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]
    advice: ClassVar[str]
    retryable: ClassVar[bool] = False
    should_retry: ClassVar[str | None] = None
    """`x-should-retry`, where the status alone would tell the OpenAI SDK the wrong thing."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        budget: Budget | None = None,
    ) -> None:
        """budget: which one is spent, if that is why: for metrics. Callers are told by the message."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.budget = budget

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, all four fields present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After`, 1 to 120 s, where waiting helps, and `retry-after-ms`, if it is known better than that.

        The OpenAI SDK goes by the finer one. `x-should-retry` where the status would mislead it.
        """
        headers = {} if self.should_retry is None else {"x-should-retry": self.should_retry}
        if self.retry_after_s is not None:
            wait_s = min(MAX_RETRY_AFTER_S, max(0.0, self.retry_after_s))
            headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
            if (wait_ms := math.ceil(1000 * wait_s)) and wait_ms != 1000 * int(headers["Retry-After"]):
                headers["retry-after-ms"] = str(wait_ms)
        return headers


class InvalidRequest(ServiceError):
    status, type = 400, "invalid_request_error"


class InvalidJSON(InvalidRequest):
    code, advice = "invalid_json", "Send one JSON object, in UTF-8, each key once."


class MissingRequiredField(InvalidRequest):
    code, advice = "missing_required_field", "Add the field that `param` names."


class UnknownParameter(InvalidRequest):
    code, advice = "unknown_parameter", "Remove the field that `param` names, or spell it as the message suggests."


class UnsupportedParameter(InvalidRequest):
    code, advice = "unsupported_parameter", "The field exists, but not with this value for this model: see the message."


class InvalidInput(InvalidRequest):
    code, advice = "invalid_input", "`param` names the item: inputs are non-empty strings without NUL characters."


class TooManyInputs(InvalidRequest):
    code, advice = "too_many_inputs", "Split the request: the message states the count and the model's limit."


class TooManyTokens(InvalidRequest):
    code = "too_many_tokens"
    advice = "Split the request, or shorten the query; `POST /v1/tokenize` counts beforehand, free of charge."


class InvalidIdempotencyKey(InvalidRequest):
    code, advice = "invalid_idempotency_key", "Send one `Idempotency-Key`: 1 to 255 printable ASCII characters."


class InvalidAPIKey(ServiceError):
    status, type, code = 401, "authentication_error", "invalid_api_key"
    advice = "Send `Authorization: Bearer <key>` with a key that is valid, not expired and not revoked."


class PermissionDenied(ServiceError):
    status, type = 403, "permission_error"


class EndpointNotAllowed(PermissionDenied):
    code, advice = "endpoint_not_allowed", "This key may not call this endpoint. Use one that may."


class ModelNotAllowed(PermissionDenied):
    code, advice = "model_not_allowed", "This key may not use this model. `GET /v1/models` lists those that it may."


class PlanLimitExceeded(PermissionDenied):
    code, advice = "plan_limit_exceeded", "The workspace has reached its spend cap of this month. Raise it, or wait."


class NotFound(ServiceError):
    status, type = 404, "not_found_error"


class ModelNotFound(NotFound):
    code, advice = "model_not_found", "`GET /v1/models` lists the models that are served."


class RouteNotFound(NotFound):
    code, advice = "route_not_found", "Check the path: `GET /openapi.json` lists them all."


class MethodNotAllowed(ServiceError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"
    advice = "Use a method that the `Allow` header names."


class Conflict(ServiceError):
    status, type = 409, "invalid_request_error"


class IdempotencyConflict(Conflict):
    code, should_retry = "idempotency_conflict", "false"
    advice = "This `Idempotency-Key` belongs to another request. Use a new key for each request."


class IdempotencyInProgress(Conflict):
    code, retryable = "idempotency_in_progress", True
    advice = "The first call with this key still runs. Retry after `Retry-After` seconds, with the same key."


class RateLimitExceeded(ServiceError):
    status, type, code, retryable = 429, "rate_limit_error", "rate_limit_exceeded", True
    advice = "Retry after `Retry-After` seconds; the message says which budget is spent."


class RequestTooLarge(ServiceError):
    status, type, code = 413, "invalid_request_error", "request_too_large"
    advice = "Split the request: the message states the limit in bytes."


class UnsupportedMediaType(ServiceError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"
    advice = "Send `Content-Type: application/json`, uncompressed."


class InternalError(ServiceError):
    status, type, code, retryable = 500, "api_error", "internal_error", True
    advice = "Our fault. Retry; if it stays, report the `X-Request-Id`."


class Unavailable(ServiceError):
    status, type, retryable = 503, "service_unavailable", True


class ModelLoading(Unavailable):
    code, advice = "model_loading", "The model is starting. Retry after `Retry-After` seconds."


class AtCapacity(Unavailable):
    code, advice = "at_capacity", "The model's queue or the service is full. Retry after `Retry-After` seconds."


class StoreUnavailable(Unavailable):
    code, advice = "store_unavailable", "Nothing can be recorded now. Retry after `Retry-After` seconds."


class RequestTimeout(ServiceError):
    status, type, code, retryable = 504, "api_error", "timeout", True
    advice = "The answer took longer than the service waits. Retry, or send fewer inputs at once."


def every_error(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """All concrete errors, in the order of the tree above."""
    for child in base.__subclasses__():
        if "code" in vars(child):
            yield child
        yield from every_error(child)


def is_name(text: str) -> bool:
    """Whether it looks like the name of a field or a model, and so may be repeated to its sender."""
    return _NAME.fullmatch(text) is not None


def shown(name: str) -> str:
    """A caller's name as it may stand in a message: quoted if it looks like a name, else not repeated at all."""
    return repr(name) if is_name(name) else "of that name"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if any is alike at all."""
    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1)), None)


def did_you_mean(nearest: str | None) -> str:
    return f" Did you mean {nearest!r}?" if nearest else ""
