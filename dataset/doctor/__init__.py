"""Checks a data file before anybody trains on it."""
