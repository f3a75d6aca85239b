"""The published methods, each a config and a stateless forward over the ops."""
