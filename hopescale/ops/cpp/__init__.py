"""C++ for CPUs: loops over small matrices, and single passes over memory where torch's operations take many."""
