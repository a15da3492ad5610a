"""Experts whose matrices are one 3-D parameter: what each multiplies, and the Hessian of it."""
