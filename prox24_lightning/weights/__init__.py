"""How a weight is cut into groups of four, which weights qualify, and how sharded ones are read."""
