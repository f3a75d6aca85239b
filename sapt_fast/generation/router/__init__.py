"""Decides which questions are answered by Skeleton-of-Thought, and which by ordinary decoding."""
