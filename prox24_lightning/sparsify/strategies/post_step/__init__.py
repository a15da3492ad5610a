"""The prox after every optimizer step, with a strength that grows."""
