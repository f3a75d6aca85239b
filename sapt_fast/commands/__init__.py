"""The commands of `sapt-fast`, one file each."""
