"""Which orders and scales of inputs are free, found from the way a model computes and proved by equal outputs."""
