"""Files: replaced as a whole, locked, named safely, read with limits."""
