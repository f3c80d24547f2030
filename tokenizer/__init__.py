"""Text <-> token ids, and chat messages -> token ids with the mask of what is trained on."""
