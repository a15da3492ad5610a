"""What ``prox24 NAME`` runs."""
