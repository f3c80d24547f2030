"""The losses. base.py says what each of them provides."""
