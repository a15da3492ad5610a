"""Which orders of inputs are free, found from the way in which a model computes and proved by equal outputs."""
