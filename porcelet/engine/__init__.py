"""The engine: requests in, tokens out. Scheduling is pure Python; only the runner and the sampler touch tensors."""
