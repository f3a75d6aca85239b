"""Ways to generate answers."""
