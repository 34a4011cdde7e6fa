"""The wire: bodies in, and the shapes that the OpenAPI page shows.

`parse` turns bytes into one canonical, frozen request: defaults filled in, a single string the same as a list of one.
Whatever is wrong raises an error of `errors.py`; limits that depend on the model are `catalog.py`'s.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from serve_app.core.catalog import MOST_DOCUMENTS, MOST_STRINGS
from serve_app.core.errors import (
    InvalidInput,
    InvalidJSON,
    MissingRequiredField,
    ServiceError,
    UnknownParameter,
    UnsupportedParameter,
    did_you_mean,
    is_name,
    nearest,
    shown,
)
from serve_app.core.known import Task
from serve_app.core.prompts import InputType
from serve_app.core.ranking import Document

MOST_COUNT = 1_000_000  # of documents or tokens, where a request may limit them
MOST_ID = 512  # characters of a document's id
_DOCUMENT = ("id", "text")
_ESCAPED_LETTER = re.compile(rb"\\u00([46][1-9a-f]|[57][0-9a]|5f)", re.IGNORECASE)
TOKEN_IDS_MESSAGE = (
    "Token ids are not accepted: they belong to one tokenizer's vocabulary, and this model's is another. Send strings. "
    "LangChain's OpenAIEmbeddings sends ids by default: pass check_embedding_ctx_length=False."
)


def _checked_input(value: Any) -> tuple[str, ...]:
    """The strings of `input`, always as a tuple. More than any model takes are not looked at, only counted, later."""
    if isinstance(value, str):
        _check_text(value, "input")
        return (value,)
    if not isinstance(value, list):
        raise InvalidInput("input must be a string or an array of strings.", param="input")
    if not value:
        raise InvalidInput("input is an empty array; send at least one string.", param="input")
    if all(_is_token_ids(item) for item in value[:MOST_STRINGS]):
        raise UnsupportedParameter(TOKEN_IDS_MESSAGE, param="input")
    if len(value) <= MOST_STRINGS:
        for index, item in enumerate(value):
            _check_text(item, f"input[{index}]")
    return tuple(value)


def _is_token_ids(item: Any) -> bool:
    if isinstance(item, list):
        return bool(item) and all(type(token) is int for token in item)
    return type(item) is int


def _check_text(text: Any, param: str) -> None:
    if not isinstance(text, str):
        raise InvalidInput(f"{param} is not a string.", param=param)
    if not text:
        raise InvalidInput(f"{param} is an empty string; send at least one character.", param=param)
    if "\0" in text:
        raise InvalidInput(f"{param} holds a NUL character (U+0000); remove it.", param=param)


def _checked_query(value: Any) -> str:
    _check_text(value, "query")
    return str(value)


def _checked_texts(value: Any) -> tuple[Document, ...] | None:
    return None if value is None else _checked_documents(value, "texts", _text_alone)


def _checked_objects(value: Any) -> tuple[Document, ...] | None:
    return None if value is None else _checked_documents(value, "documents", _text_or_object)


def _checked_documents(value: Any, name: str, read: Callable[[Any, str], Document]) -> tuple[Document, ...]:
    """As with `input`, what is more than may be is only counted, later."""
    if not isinstance(value, list):
        raise InvalidInput(f"{name} must be an array.", param=name)
    if not value:
        raise InvalidInput(f"{name} is an empty array; send at least one.", param=name)
    if len(value) > MOST_DOCUMENTS:
        return (Document(text=""),) * len(value)
    return tuple(read(item, f"{name}[{index}]") for index, item in enumerate(value))


def _text_alone(item: Any, param: str) -> Document:
    _check_text(item, param)
    return Document(text=item)


def _text_or_object(item: Any, param: str) -> Document:
    if not isinstance(item, dict):
        return _text_alone(item, param)
    for name in item:
        if name not in _DOCUMENT:
            _refuse_name(name, _DOCUMENT, prefix=f"{param}.")
    if "text" not in item:
        raise MissingRequiredField(f"{param}.text is required.", param=f"{param}.text")
    _check_text(item["text"], f"{param}.text")
    id = item.get("id")
    if id is not None and (not isinstance(id, str) or not 1 <= len(id) <= MOST_ID):
        raise InvalidInput(f"{param}.id must be a string of 1 to {MOST_ID} characters.", param=f"{param}.id")
    return Document(text=item["text"], id=id)


def _absent_if_null(default: Any) -> BeforeValidator:
    """Clients that send null for what they leave out mean the default."""
    return BeforeValidator(lambda value: default if value is None else value)


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Texts = Annotated[
    tuple[str, ...],
    PlainValidator(_checked_input),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MOST_STRINGS},
            ],
            "description": "One text or several; each is one vector. Empty strings and NUL characters are refused.",
        }
    ),
]
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"text": _TEXT, "id": _TEXT | {"maxLength": MOST_ID}},
    "required": ["text"],
    "additionalProperties": False,
}


def _documents_schema(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"type": "array", "items": item, "minItems": 1, "maxItems": MOST_DOCUMENTS})


Query = Annotated[
    str,
    PlainValidator(_checked_query),
    WithJsonSchema(_TEXT | {"description": "What documents are ranked by. It must leave them room in the context."}),
]
PlainDocuments = Annotated[tuple[Document, ...] | None, PlainValidator(_checked_texts), _documents_schema(_TEXT)]
Documents = Annotated[
    tuple[Document, ...] | None,
    PlainValidator(_checked_objects),
    _documents_schema({"anyOf": [_TEXT, _OBJECT]}),
]
GroupBy = Literal["day", "model", "api_key"]
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
ModelName = Annotated[str, Field(description="Short id or canonical name, in any case: see GET /v1/models.")]


AskedInputType = Annotated[
    InputType | None, Field(description="Put the model's prompt for it before each text. Default: none.")
]


Count = Annotated[int, Field(ge=1, le=MOST_COUNT), BeforeValidator(_whole)]
EndUser = Annotated[Annotated[str, Field(max_length=256)] | None, Field(description="Your end user, for usage.")]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which a request has exactly one."""

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """None: whatever prints a request by mistake prints no text of a caller."""
        return ()


class EmbeddingsRequest(_Request):
    """The body of `POST /v1/embeddings`."""

    model: ModelName
    input: Texts
    encoding_format: Annotated[Literal["float", "base64"], _absent_if_null("float")] = "float"
    dimensions: Annotated[Annotated[int, Field(ge=1)] | None, Field(description="Default: the native size.")] = None
    user: EndUser = None
    input_type: AskedInputType = None


class _Pairs(_Request):
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["texts"]}, {"required": ["documents"]}]})
    one_of: ClassVar[tuple[str, ...]] = ("texts", "documents")

    model: ModelName
    query: Query
    texts: PlainDocuments = None
    documents: Documents = None
    max_tokens_per_doc: Annotated[Count | None, Field(description="Longer documents are cut.")] = None

    @property
    def ranked(self) -> tuple[Document, ...]:
        """The documents, whichever field they came in."""
        return self.documents or self.texts or ()

    @property
    def ranked_field(self) -> str:
        return "documents" if self.documents else "texts"


class RerankRequest(_Pairs):
    """The body of `POST /v1/rerank`: one of `texts` and `documents`."""

    top_n: Annotated[Count | None, Field(description="Default: all.")] = None
    return_documents: Annotated[bool, _absent_if_null(False), Field(description="Texts in `rankings`, too.")] = False
    user: EndUser = None


class TokenizePairsRequest(_Pairs):
    """The body of `POST /v1/tokenize`, for a model that ranks documents."""


class TokenizeRequest(_Request):
    """The body of `POST /v1/tokenize`, for a model that embeds."""

    model: ModelName
    input: Texts
    input_type: AskedInputType = None


class UsageQuery(_Request):
    """The query of `GET /v1/usage`. Days are UTC, both inclusive."""

    first_day: str
    last_day: str
    group_by: tuple[GroupBy, ...]


class UsageRow(BaseModel):
    """Added up by what `group_by` names; the other names are absent."""

    day: str | None = None
    model: str | None = None
    api_key: str | None = Field(None, description="The key's id.")
    kind: Literal["tokens", "gpu_time"]
    requests: int | None = Field(None, description="Of kind tokens: successes, replays not counted.")
    input_tokens: int | None = None
    reserved_gpu_hours: str | None = Field(None, description="Of kind gpu_time: a decimal.")
    amount_micros: int = Field(description="Millionths of a US dollar, rounded once, half to even.")


class UsageReport(BaseModel):
    object: Literal["usage"]
    workspace: str
    first_day: str = Field(alias="from")
    last_day: str = Field(alias="to")
    group_by: list[GroupBy]
    currency: Literal["USD"]
    data: list[UsageRow]
    total_amount_micros: int


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class TruncationWarning(BaseModel):
    code: Literal["input_truncated"]
    index: int
    tokens: int
    kept: int


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    warnings: list[TruncationWarning] | None = Field(None, description="Absent when there are none.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Floats, or base64 of little-endian float32.")


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Score(BaseModel):
    index: int
    score: float = Field(description="0 to 1: the sigmoid of what the model says.")


class Ranking(Score):
    id: str | None = Field(None, description="The document's, if it came with one.")
    text: str | None = Field(None, description="With `return_documents`.")


class RankedText(BaseModel):
    text: str


class Result(Ranking):
    relevance_score: float | None = Field(None, description="The score again, where the request had `documents`.")
    document: RankedText | None = Field(None, description="With `documents` and `return_documents`.")


class RerankResponse(BaseModel):
    object: Literal["runinfra.rerank"]
    model: str
    upstream_model: str
    scores: list[Score] = Field(description="In the order of the documents.")
    rankings: list[Ranking] = Field(description="Best first, at most `top_n`.")
    results: list[Result] = Field(description="The same.")
    document_count: int
    usage: Usage


class TokenCount(BaseModel):
    object: Literal["token_count"]
    index: int
    tokens: int = Field(description="What would be billed: after truncation, special tokens included.")
    truncated: bool


class TokenizeResponse(BaseModel):
    object: Literal["list"]
    data: list[TokenCount]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    canonical_name: str
    task: Task = Field(description="`embed`: for `/v1/embeddings`; `rerank`: for `/v1/rerank`.")
    dimensions: int | None = Field(description="Of its vectors; null: it ranks documents.")
    max_tokens: int
    input_types: list[InputType] = Field(description="What `input_type` may say: nothing, if the model has no prompts.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ModelState(BaseModel):
    state: str
    replicas: int
    pending_sequences: int


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    models: dict[str, ModelState]


Request = TypeVar("Request", bound=_Request)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request of this kind, or the error that names the first thing wrong with it."""
    return _parsed(kind, body, _loads(body))


def parse_tokenize(body: bytes) -> TokenizeRequest | TokenizePairsRequest:
    """With a query it is about pairs. Raises as `parse` does."""
    fields = _loads(body)
    if isinstance(fields, dict) and "query" in fields:
        return _parsed(TokenizePairsRequest, body, fields)
    return _parsed(TokenizeRequest, body, fields)


def _parsed(kind: type[Request], body: bytes, fields: Any) -> Request:
    if not isinstance(fields, dict):
        raise InvalidJSON("The body must be a JSON object.")
    _check_names(kind, fields)
    _check_duplicates(body, fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        # Not `from error`: pydantic's error quotes its input, and no log may.
        field = str(error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][0])
    raise _bad_value(field)


def canonical(request: _Request) -> bytes:
    """The parsed request as bytes: equal for bodies that differ only in key order, white space or stated defaults.

    A reply that is kept must be found by later versions: what comes to be is left out where it says nothing.
    """
    fields = {name: getattr(request, name) for name in type(request).model_fields}
    if isinstance(request, RerankRequest):
        defaults = {name: field.default for name, field in type(request).model_fields.items()}
        fields = {name: value for name, value in fields.items() if value != defaults[name]}
        for name in request.one_of:
            if name in fields:
                fields[name] = [[it.text] if it.id is None else [it.text, it.id] for it in fields[name]]
    elif fields.get("input_type") is None:
        fields.pop("input_type", None)
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def parse_usage_query(query: Mapping[str, str], *, today: str) -> UsageQuery:
    """`from`, `to` (default: this month so far) and `group_by`, a list with commas. Raises as `parse` does."""
    for name in query:
        if name not in ("from", "to", "group_by"):
            _refuse_name(name, ("from", "to", "group_by"))
    last_day = _day(query, "to", today)
    first_day = _day(query, "from", last_day[:8] + "01")
    if first_day > last_day:
        raise InvalidInput("from is after to.", param="from")
    asked = query.get("group_by", "day,model").split(",")
    group_by = tuple(name for name in GROUPS if name in asked)
    if not group_by or len(group_by) < len(asked):
        raise UnsupportedParameter(f"group_by takes {', '.join(GROUPS)}, each once, with commas.", param="group_by")
    return UsageQuery(first_day=first_day, last_day=last_day, group_by=group_by)


def _day(query: Mapping[str, str], name: str, default: str) -> str:
    text = query.get(name, default)
    try:
        if dt.date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise InvalidInput(f"{name} must be a day such as 2026-11-25.", param=name)


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        _explain_json(body)


def _check_names(kind: type[_Request], fields: Mapping[str, Any]) -> None:
    """A missing field first: what else is wrong often follows from it."""
    for name, field in kind.model_fields.items():
        if field.is_required() and name not in fields:
            raise MissingRequiredField(f"The field {name!r} is required.", param=name)
    given = [name for name in kind.one_of if fields.get(name) is not None]
    if kind.one_of and not given:
        raise MissingRequiredField(f"One of {' and '.join(kind.one_of)} is required.", param=kind.one_of[-1])
    for name in fields:
        if name not in kind.model_fields:
            _refuse_name(name, kind.model_fields)
    if len(given) > 1:
        raise InvalidInput(f"Send one of {' and '.join(kind.one_of)}, not both.", param=given[-1])


def _refuse_name(name: str, known: Iterable[str], *, prefix: str = "") -> NoReturn:
    hint = did_you_mean(nearest(name[:64], known))
    raise UnknownParameter(
        f"There is no parameter {shown(name)} here.{hint}", param=f"{prefix}{name}" if is_name(name) else None
    )


def _check_duplicates(body: bytes, fields: Mapping[str, Any]) -> None:
    """The slow look is taken only where a name stands too often, though perhaps in a text, or may be in escapes."""
    documents = fields.get("documents")
    documents = [it for it in documents if isinstance(it, dict)] if isinstance(documents, list) else []
    names = Counter(fields.keys()) + Counter({name: sum(name in it for it in documents) for name in _DOCUMENT})
    if _ESCAPED_LETTER.search(body) or any(body.count(b'"%b"' % it.encode()) > names[it] for it in names):
        try:
            json.loads(body, object_pairs_hook=_refuse_duplicates)
        except RecursionError:
            raise InvalidJSON("The body is nested too deeply.") from None


def _refuse_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Two values for one key: parsers disagree which counts, so neither may be billed."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise InvalidJSON(f"The key {shown(key)} stands in the body twice.")
        seen[key] = value
    return seen


def _explain_json(body: bytes) -> NoReturn:
    """orjson refused it. A lone surrogate (half of a UTF-16 pair) is JSON to others: then say which item holds it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    for param, text in _texts_in(fields) if isinstance(fields, dict) else ():
        if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidInput(f"{param} holds a lone surrogate, which is no character; remove it.", param=param)
    raise InvalidJSON("The body is not valid JSON in UTF-8.")


def _texts_in(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What may be a caller's text, and where it stands."""
    for name in ("input", "query", "texts", "documents"):
        value = fields.get(name)
        for index, item in enumerate(value) if isinstance(value, list) else ():
            param = f"{name}[{index}]"
            yield (f"{param}.text", item.get("text")) if isinstance(item, dict) else (param, item)
        yield name, value


def _bad_value(field: str) -> ServiceError:
    match field:
        case "encoding_format":
            return UnsupportedParameter("encoding_format must be 'float' or 'base64'.", param=field)
        case "dimensions":
            return UnsupportedParameter("dimensions must be a positive integer.", param=field)
        case "top_n" | "max_tokens_per_doc":
            return UnsupportedParameter(f"{field} must be an integer from 1 to {MOST_COUNT:,}.", param=field)
        case "return_documents":
            return UnsupportedParameter("return_documents must be true or false.", param=field)
        case "input_type":
            return UnsupportedParameter("input_type must be 'query' or 'document'.", param=field)
        case "user":
            return InvalidInput("user must be a string of at most 256 characters.", param=field)
        case _:
            return InvalidInput(f"{field} must be a string.", param=field)
