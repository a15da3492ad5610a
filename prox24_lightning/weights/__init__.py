"""The weights of a model: which ones become 2:4, how they are cut into groups of four, laid out and sharded."""
