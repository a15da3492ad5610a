"""2:4 weights at half the size: the portable form, and files of it."""
