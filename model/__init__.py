"""What a model is. No file here knows about data, training or the command line."""
