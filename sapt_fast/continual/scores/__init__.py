"""Metrics and reports of one run."""
