"""Our Triton kernel that packs a weight with a frozen mask in one pass."""
