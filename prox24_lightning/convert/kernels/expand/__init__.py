"""The dense weight made anew from the packed one at every call, then cuBLAS; and the expansion alone."""
