"""Model definitions: one for training, prefill and decode."""
