"""Bytes and FLOPs of every op, by formula: one file per op, letters as in `roofline.py`."""
