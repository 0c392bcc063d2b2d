"""Layers that sit on a frozen base model: low-rank adapters and the formats they are stored in."""
