"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import ChatCompletion, ChatCompletionChunk, documented
from server.api.generation import new_id, respond, tenant_of
from server.api.orders import chat_orders
from server.api.schemas import ChatRequest

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/chat/completions", responses=documented(ChatCompletion, chunk=ChatCompletionChunk)
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation; with `risk`, every token comes with its calibrated risk."""
    service = request.app.state.service
    answer_id = new_id("chatcmpl")
    orders = await chat_orders(service, body, request_id=answer_id, tenant=tenant_of(request))
    return await respond(request, service, body, orders=orders, answer_id=answer_id)
