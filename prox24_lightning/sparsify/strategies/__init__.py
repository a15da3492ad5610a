"""How weights become 2:4 during the sparsify phase."""
