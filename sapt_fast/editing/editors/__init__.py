"""The editing methods that the runner knows; `registry.EDITORS` has their names."""
