"""Layer norm over channels, linear layer, optional GELU."""
