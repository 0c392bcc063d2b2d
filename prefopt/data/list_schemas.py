"""Rows with a prompt and a list of responses that are ranked or scored."""

from __future__ import annotations

from prefopt.data.schemas import Schema

LIST_SCHEMAS: list[Schema] = []
