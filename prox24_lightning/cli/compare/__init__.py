"""``prox24 compare``: dense, one-shot magnitude and Prox24 from one config."""
