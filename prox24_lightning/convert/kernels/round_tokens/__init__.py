"""Round tokens to 8 bits with a scale each."""
