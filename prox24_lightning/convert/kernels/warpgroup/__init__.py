"""Our CUDA kernel for 1 to 512 tokens on Hopper's sparse ``wgmma``."""
