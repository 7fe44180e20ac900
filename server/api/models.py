"""`GET /v1/models` and `GET /v1/probes`: what is served and what reads it."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from probes.card import ResponseRule, TokenRule
from probes.probe import Probe
from server.api.answers import documented
from server.api.errors import APIError
from server.api.listings import Model, ModelList, ProbeList
from server.service import Service

router = APIRouter(tags=["openai"])


@router.get("/v1/models", responses=documented(ModelList))
async def list_models(request: Request) -> dict[str, Any]:
    """The names under which the one model is served."""
    service = request.app.state.service
    return {"object": "list", "data": [_model(service, name) for name in service.served_names]}


@router.get("/v1/models/{model:path}", responses=documented(Model))
async def read_model(model: str, request: Request) -> dict[str, Any]:
    """One of those names."""
    service = request.app.state.service
    if model not in service.served_names:
        raise APIError(404, "no such model", param="model", code="model_not_found")
    return _model(service, model)


@router.get("/v1/probes", responses=documented(ProbeList))
async def list_probes(request: Request) -> dict[str, Any]:
    """The cards of the loaded probes: thresholds with what they cost, evaluation, limits."""
    service = request.app.state.service
    return {"object": "list", "data": [_probe(service, probe) for probe in service.engine.probes]}


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "hneurons",
        "max_model_len": service.engine.card.max_model_len,
    }


def _probe(service: Service, probe: Probe) -> dict[str, Any]:
    card = probe.card
    day = datetime.date.fromisoformat(card.created[:10])
    return {
        "id": probe.id,
        "object": "probe",
        "name": card.name,
        "default": card.name == service.default_probe,
        "position": card.position,
        "heads": list(card.heads),
        "neurons": len(probe.neuron),
        "layers": len(set(probe.layer.tolist())),
        "h_neurons": len(probe.h_neurons),
        "suppression": service.suppression and len(probe.h_neurons) > 0,
        "thresholds": {"token": _rule(card.token), "response": _rule(card.response)},
        "evaluation": msgspec.to_builtins(card.evaluation),
        "not_good_for": list(card.not_good_for),
        "created": int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()),
    }


def _rule(rule: TokenRule | ResponseRule) -> dict[str, Any]:
    points = msgspec.to_builtins(rule.operating_points)
    return {"head": rule.head, "default": rule.default, "operating_points": points}
