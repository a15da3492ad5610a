"""The fused Triton kernels of the prox: launch, tiles, equations, statistics."""
