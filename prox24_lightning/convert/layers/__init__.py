"""Modules that run on packed 2:4 weights."""
