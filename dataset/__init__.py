"""Files -> token tensors."""
