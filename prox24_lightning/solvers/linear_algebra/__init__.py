"""Cholesky factors and inverses of Hessians."""
