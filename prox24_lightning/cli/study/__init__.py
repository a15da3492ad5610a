"""``prox24 study``: figures, tables and the report."""
