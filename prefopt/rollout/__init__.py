"""Responses from a model: prompts in, text or tokens out."""
