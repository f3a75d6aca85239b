"""What a patched model looks like on disk, and how it is read again."""
