"""From `response_format` to the JSON Schema that the engine holds the answer to."""

from __future__ import annotations

import asyncio

import orjson

from server.api.errors import APIError
from server.api.schemas import ChatRequest, JSONSchemaFormat, ResponseFormat, TextFormat
from server.engines.base import GuidedEngine
from server.service import Service

MAX_SCHEMA_BYTES = 65_536
_ANY_OBJECT = '{"type":"object"}'


async def json_schema(service: Service, body: ChatRequest) -> str | None:
    """The schema as text, or None for free text; APIError when it cannot be kept here."""
    if body.response_format is None or isinstance(body.response_format, TextFormat):
        return None
    engine = service.engine
    if not isinstance(engine, GuidedEngine):
        raise APIError(
            400,
            "this engine writes free text only; a server with --engine vllm can be held to JSON",
            param="response_format",
            code="invalid_value",
        )
    if body.ignore_eos:
        raise APIError(
            400,
            "text after the end of the JSON is not JSON: leave ignore_eos out",
            param="ignore_eos",
            code="invalid_value",
        )
    schema, param = _schema(body.response_format)
    if len(schema) > MAX_SCHEMA_BYTES:
        raise APIError(
            400,
            f"a schema has at most {MAX_SCHEMA_BYTES} bytes",
            param=param,
            code="invalid_value",
        )
    try:
        await asyncio.to_thread(engine.check_schema, schema)
    except ValueError as error:  # its text may quote the schema, which we never do
        raise APIError(
            400,
            "no grammar can be made of this schema: it is not a JSON Schema, or it uses a keyword "
            "that the engine's grammars do not know (multipleOf, uniqueItems, contains, allOf)",
            param=param,
            code="invalid_value",
        ) from error
    return schema


def _schema(wanted: ResponseFormat) -> tuple[str, str]:
    """(schema as text, its path in the request); the order of properties is kept."""
    if isinstance(wanted, JSONSchemaFormat):
        return orjson.dumps(
            wanted.json_schema.schema_
        ).decode(), "response_format.json_schema.schema"
    return _ANY_OBJECT, "response_format"
