"""Streams of keys, values and queries from projected inputs."""

from hopescale.ops.head_streams.operation import head_streams

__all__ = ["head_streams"]
