"""A local S3 server, for tests of object stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import fsspec
import pytest


@contextmanager
def serve_bucket() -> Iterator[str]:
    """Serve an empty bucket on a free port; give its address, which fsspec finds by its settings."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
            bucket = f"bucket-{uuid4().hex}"  # moto keeps the buckets of a process when its server stops
            fsspec.filesystem("s3").mkdir(bucket)
            yield f"s3://{bucket}"
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            server.stop()
