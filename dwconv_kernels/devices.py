"""What GPUs have, by compute capability (90 is 9.0): numbers that launch choices and reports are made from."""

# Streaming multiprocessors of the biggest common GPU of an architecture.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 170}

# Shared memory that one program can have, in KB. What is not listed here has at least 99.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
REGISTERS = 65_536  # of a multiprocessor


def multiprocessors(arch: int) -> int:
    """Of ``arch``; 1 of the interpreter (0), which runs one program after another."""
    return MULTIPROCESSORS.get(arch, 132) if arch else 1


def shared_kb(arch: int) -> int:
    """The least that any GPU has, for those not known; the interpreter (0) counts as the GPU most kernels are for."""
    return SHARED_KB.get(arch or 90, 99)
