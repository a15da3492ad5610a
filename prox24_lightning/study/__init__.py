"""The maths behind ``prox24 study``: the prox itself, local against global optima, failures and ablations.

Each part is a pure function of sizes and a seed that returns tables; ``cli/study`` reads models, draws and writes.
"""
