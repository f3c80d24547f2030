"""Other people's names and layouts."""
