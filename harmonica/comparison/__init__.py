"""What scripts/compare.py does: every method at several cost levels, on the same seeds.

Quality is reported three ways: a Frechet distance to real images; the error against the uncached
run of the compared sampler; and the error against the exact solution from the same noise (DDIM with
many steps), which alone compares across samplers and numbers of steps. Finished cells are kept.
"""
