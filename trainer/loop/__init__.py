"""The training loop, and how its processes work together."""
