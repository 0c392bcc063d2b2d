"""Objectives: (policy, batch) -> (sum of losses, count, sums of metrics)."""
