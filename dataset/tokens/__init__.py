"""Canonical rows -> token sequences, on disk."""
