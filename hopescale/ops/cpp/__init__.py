"""C++ for CPUs: loops over small matrices, and single passes over memory where torch's operations take many."""

from hopescale.ops.cpp.build import BuildError, library, unsupported_reason
from hopescale.ops.cpp.call import LANES, parallel_for, pointer, pointers

__all__ = ["LANES", "BuildError", "library", "unsupported_reason", "pointer", "pointers", "parallel_for"]
