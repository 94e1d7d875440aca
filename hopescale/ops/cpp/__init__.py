"""C++ for CPUs: loops over small matrices, and single passes over memory where torch's operations take many."""

from hopescale.ops.cpp.build import BuildError, library, obstacle
from hopescale.ops.cpp.call import LANES, pointer, pointers, share_out

__all__ = ["LANES", "BuildError", "library", "obstacle", "pointer", "pointers", "share_out"]
