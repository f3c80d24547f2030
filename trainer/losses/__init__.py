"""What is minimised: one table row and one class for each loss."""
