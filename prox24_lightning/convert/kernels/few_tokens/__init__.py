"""CUDA kernels for few tokens on mma.sp, and the expansion to a dense weight."""
