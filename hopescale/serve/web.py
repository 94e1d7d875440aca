"""The web server under the application: where it listens, and how signals end it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hopescale.common.errors import LaunchError
from hopescale.common.signals import stopping


class WebServer(uvicorn.Server):
    """A server that a signal ends after the answers that are being written, and a second one at once.

    Args:
        app: Application.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        grace: Seconds for those answers; then they are cut off.

    Raises:
        LaunchError: If the address cannot be listened on. Clients may connect as soon as the server is made.
    """

    def __init__(self, app: FastAPI, host: str, port: int, grace: int):
        super().__init__(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
        self._socket = _listening(host, port, self.config.backlog)
        self._grace: float = grace
        self._ending: asyncio.AbstractEventLoop | None = None

    @property
    def port(self) -> int:
        """Port that it listens at."""
        return self._socket.getsockname()[1]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; uvicorn itself goes by a second one only if that is SIGINT."""
        if self.should_exit:
            self._grace = 0
            if self._ending is not None:
                self._ending.call_soon_threadsafe(self._hang_up)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers that are being written, while there is time."""
        self._ending = asyncio.get_running_loop()
        timer = self._ending.call_later(self._grace, self._hang_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._ending = None

    def _hang_up(self) -> None:
        """Leave all clients, as if they had hung up themselves: their requests end at the next token."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def answer(self) -> None:
        """Answer until a signal comes."""
        with self._signals():
            self.run(sockets=[self._socket])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in stopping()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listening(host: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        LaunchError: If there is none, as where another process listens.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(backlog)
    except OSError as error:
        found.close()
        hint = "choose another --port, or a --host of this machine"
        raise LaunchError(f"cannot listen at {host}:{port}: {error.strerror}", hint) from None
    return found
