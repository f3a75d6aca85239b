"""What the method of memory experts consists of, besides its config and handle."""
