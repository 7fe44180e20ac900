"""From `response_format` and `tools` to what the engine is held to and the parser looks for."""

from __future__ import annotations

import asyncio

import orjson

from server.api.errors import APIError
from server.api.schemas import ChatRequest, JSONObjectFormat, JSONSchemaFormat, NamedToolChoice
from server.engines.base import Grammar, GuidedEngine
from server.parsing import Rules, ToolUse
from server.service import Service

MAX_SCHEMA_BYTES = 65_536
_ANY_OBJECT = '{"type":"object"}'


def tool_use(service: Service, body: ChatRequest) -> ToolUse | None:
    """The tools that may be called; None when there are none, or none may be."""
    choice = body.tool_choice
    if body.tools is None:
        if choice is not None and choice != "none":
            raise _refusal("tool_choice", "there are no tools to choose from: send tools, too")
        return None
    if service.parsers is None or not service.parsers.calls_tools:
        raise _refusal("tools", "this server knows no tool calls; start it with --tool-call-parser")
    if choice == "none":
        return None
    function = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if function is not None and all(tool.function.name != function for tool in body.tools):
        raise _refusal("tool_choice", "names a function that is not among the tools")
    return ToolUse(
        tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools),
        must_call=choice == "required",
        function=function,
        parallel=body.parallel_tool_calls is not False,
    )


def answer_rules(service: Service, tools: ToolUse | None) -> Rules | None:
    """How the answer is parsed; None: it is all content."""
    if service.parsers is None:
        return None
    try:
        return service.parsers.rules(tools)
    except ValueError as error:
        raise _refusal("tools", str(error)) from error


async def answer_grammar(
    service: Service, body: ChatRequest, tools: ToolUse | None, rules: Rules | None
) -> Grammar | None:
    """What the engine is held to; None for free text. APIError when it cannot be, here."""
    asked = _json(body)
    if asked is not None and tools is not None:
        raise _refusal("response_format", "an answer is held to JSON or may call tools, not both")
    if asked is not None:
        wanted, param = asked
    elif rules is not None and rules.grammar is not None:
        wanted, param = rules.grammar, "tools"
    else:
        return None
    engine = service.engine
    if not isinstance(engine, GuidedEngine):
        raise _refusal(
            "response_format",
            "this engine writes free text only; a server with --engine vllm can be held to JSON",
        )
    if body.ignore_eos:
        raise _refusal("ignore_eos", "text after the end of the JSON is not JSON: leave it out")
    if len(wanted.text) > MAX_SCHEMA_BYTES:
        raise _refusal(param, f"a schema has at most {MAX_SCHEMA_BYTES} bytes")
    try:
        await asyncio.to_thread(engine.check_grammar, wanted)
    except ValueError as error:  # its text may quote the schema, which we never do
        raise _refusal(
            param,
            "no grammar can be made of this schema: it is not a JSON Schema, or it uses a keyword "
            "that the engine's grammars do not know (multipleOf, uniqueItems, contains, allOf)",
        ) from error
    return wanted


def _json(body: ChatRequest) -> tuple[Grammar, str] | None:
    """The schema of a JSON answer and its path in the request; properties keep their order."""
    match body.response_format:
        case JSONSchemaFormat() as named:
            schema = orjson.dumps(named.json_schema.schema_).decode()
            return Grammar("json", schema), "response_format.json_schema.schema"
        case JSONObjectFormat():
            return Grammar("json", _ANY_OBJECT), "response_format"
        case _:
            return None


def _refusal(param: str, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")
