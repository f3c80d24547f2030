"""Tools around the trainer: the demo, and more to come."""
