"""Packing a weight with a frozen mask in one pass, as a Triton kernel."""
