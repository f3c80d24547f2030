"""The built-in data: a small invented world in Chinese and English, and an exam about it."""
