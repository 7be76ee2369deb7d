"""The verbs in Triton: the GPU path where no CUDA build is at hand.

Installed as `hotgraft.triton_kernels`, used by `hotgraft.kernels.triton`. A file a verb, each with
its kernels and the functions that launch them; `value` says what bits mean, as csrc/core/value.h
does, and `table` finds an entry's segment. With TRITON_INTERPRET=1 set before Triton is imported
the same kernels run on the CPU.
"""
