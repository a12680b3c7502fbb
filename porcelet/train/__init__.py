"""Training: one loop for every method. A method is where its samples come from, and three weights a token."""
