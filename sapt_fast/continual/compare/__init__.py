"""Several strategies, seeds and orders in one table."""
