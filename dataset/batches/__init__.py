"""Token sequences -> this rank's batches."""
