"""Rows with two responses side by side and a verdict in another column: which one is better."""

from __future__ import annotations

from prefopt.data.schemas import Schema

CHOICE_SCHEMAS: list[Schema] = []
