"""cuBLAS on a dense weight that is kept beside the packed one."""
