"""Saying something: the cache, sampling, decoding, a conversation."""
