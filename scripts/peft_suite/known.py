"""Tests of PEFT that pass plain and fail patched, and why that is right."""

KNOWN: dict[str, str] = {}
