"""Multiply with a dense weight of 8 bits, for comparison and for layers that are fastest in this form."""
