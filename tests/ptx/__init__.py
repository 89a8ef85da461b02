"""Runs compiled kernels without a GPU: their PTX, as Triton's compiler makes it for a GPU, in NumPy.

Triton's interpreter says that a kernel's source is right. Between source and GPU lie the layouts that the compiler
gives to tensors, the fragments of matrix instructions, the barriers and the predicates: those are in the PTX, and are
run here.

- :mod:`tests.ptx.driver`: launches of Triton kernels on CPU tensors, compiled and run here (:func:`emulated`).
- :mod:`tests.ptx.program`: reads PTX.
- :mod:`tests.ptx.machine`: threads, registers, branches, barriers.
- :mod:`tests.ptx.memory`: global and shared memory, and what compute-sanitizer would say of accesses.
- :mod:`tests.ptx.arithmetic`, :mod:`tests.ptx.matrices`: instructions.

Not a model of time, nor of what ptxas makes of PTX. Instructions that our kernels do not need raise. Not looked for:
what threads of one warp read of each other without ``bar.warp.sync``, and wgmma's fence. Subnormal numbers are not
flushed.
"""
