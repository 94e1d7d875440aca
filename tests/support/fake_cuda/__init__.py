"""Whole training steps on a CUDA device that has no memory and runs nothing, where torch was built without CUDA."""
