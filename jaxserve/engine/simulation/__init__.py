"""The real scheduler and block pool under a virtual clock: what traffic does to it, and what must hold.

No jax: a step is a cost model, a token a number.
"""
