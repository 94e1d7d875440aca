"""The chunks of a sequence in C++, for CPUs."""

from hopescale.ops.self_modifying.cpp.build import BuildError, library
from hopescale.ops.self_modifying.cpp.function import LANES, self_modify_cpp

__all__ = ["LANES", "BuildError", "library", "self_modify_cpp"]
