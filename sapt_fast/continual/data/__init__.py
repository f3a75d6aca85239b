"""Tasks, their order, and rows as a model reads them."""
