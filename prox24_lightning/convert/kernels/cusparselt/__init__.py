"""NVIDIA's cuSPARSELt, bound with plans that are made once."""
