"""PTX, what nvcc makes of our kernels for a card, run and watched where there is no card.

`card.py` is a CUDA runtime of our own under the real library, `machine.py` runs a block of threads instruction by
instruction, and `memory.py` watches what it reads and writes. Only what our kernels use of PTX is there.
"""
