"""Shapes in which several rows make one comparison: trees of messages, responses with a score."""

from __future__ import annotations

from prefopt.data.schemas import Schema

GROUPED_SCHEMAS: list[Schema] = []
