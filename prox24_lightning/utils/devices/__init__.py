"""Memory of the CPU and of GPUs, and CUDA graphs."""
