"""How sparse a run is and at what price: statistics, history, figures, tables."""
