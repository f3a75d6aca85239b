"""Continual learning: data, task orders, metrics, reports."""
