"""Everything between a model's files and its parameters."""
