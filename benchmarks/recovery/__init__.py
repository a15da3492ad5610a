"""The protocol that compares ways to a good 2:4 model at equal steps, on equal data."""
