"""Products with a packed weight on a GPU: NVIDIA's library, the package's own kernels, and the choice between them."""
