"""Our CUDA kernel for many tokens and a weight of 8 bits on Hopper."""
