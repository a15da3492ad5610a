"""Which kernel runs a layer: measured on this GPU, kept on disk."""
