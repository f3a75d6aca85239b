"""How the weights of one forward reach every layer."""
