"""Methods from papers; each is a config and a handle."""
