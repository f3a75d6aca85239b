"""File helpers: atomic replacement, locks, safe names, bounded reading."""
