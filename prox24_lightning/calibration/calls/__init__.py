"""What a module is called with: hooks, arguments as trees of tensors, and calls that are recorded and repeated."""
