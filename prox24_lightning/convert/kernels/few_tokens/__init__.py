"""Our CUDA kernel for 1 to 256 tokens on the sparse tensor cores' ``mma.sp``, Ampere and newer."""
