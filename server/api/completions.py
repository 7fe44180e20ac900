"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import TextCompletion, documented
from server.api.generation import new_id, respond, tenant_of
from server.api.orders import completion_orders
from server.api.schemas import CompletionRequest

router = APIRouter(tags=["openai"])


@router.post("/v1/completions", responses=documented(TextCompletion, chunk=TextCompletion))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts; with `risk`, as in chat."""
    service = request.app.state.service
    answer_id = new_id("cmpl")
    orders = await completion_orders(service, body, request_id=answer_id, tenant=tenant_of(request))
    return await respond(request, service, body, orders=orders, answer_id=answer_id)
