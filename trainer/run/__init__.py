"""What a run leaves behind: resume states, weights, logs."""
