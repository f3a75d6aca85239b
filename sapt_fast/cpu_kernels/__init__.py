"""CPU backend: torch GEMMs, with C++ from ``sapt_fast._C`` where torch would need an extra pass."""
