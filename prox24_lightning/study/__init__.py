"""What the prox does, how close local comes to global, and where it fails: the maths behind ``prox24 study``.

Each part is a pure function of sizes and a seed that returns tables; ``commands/`` reads models, draws and writes.
"""
