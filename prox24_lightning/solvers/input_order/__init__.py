"""The order of a layer's inputs: which four of them share a group."""
