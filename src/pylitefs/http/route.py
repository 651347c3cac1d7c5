"""A row of the table of routes, and the usual answers."""

from __future__ import annotations

import json
from dataclasses import dataclass

from aiohttp import web

from pylitefs.http.errors import Handler
from pylitefs.status import Json


@dataclass(frozen=True)
class Route:
    """What is called for a method and a path. A HEAD is a row of its own."""

    method: str
    path: str
    handler: Handler


def json_answer(document: Json | list[Json]) -> web.Response:
    return web.Response(text=json.dumps(document, indent=2) + "\n", content_type="application/json")


def line_answer(text: str, status: int = 200) -> web.Response:
    return web.Response(status=status, text=" ".join(text.split()) + "\n")
