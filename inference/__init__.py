"""Generation: key/value cache, sampling, decoding, conversations."""
