"""LoRA's arithmetic: one function per operation on the effective weight, and the slow obvious form of each.

`reference` says what every layer computes. `linear`, `conv` and `embedding` compute the same with less time and memory:
their autograd functions keep the input and what is tiny, and read a frozen weight through `frozen`.
"""
