"""The file formats of saved models: writing, reading and checking them."""
