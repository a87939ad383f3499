"""Noticing that another process of a run has died where nothing else does.

A process that waits for CUDA runs neither exception handlers nor signal handlers, and NCCL can wait for a dead process
for minutes. So every process keeps a connection to the main process, and a thread reads it: the system closes a
connection when a process ends, however that ends, and not because it is busy saving or compiling.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

__all__ = ["Watch", "watch_processes"]

GRACE = 5.0  # seconds in which the program can report by itself what another backend has told it
GOODBYE = b"."


def watch_processes(store: dist.Store, rank: int, count: int, timeout: float, report: Callable[[], None]) -> "Watch":
    """Connect all processes of a run, and watch them until `Watch.leave`. Every process has to call it.

    Args:
        store: of the process group.
        timeout: seconds to wait for the others.
        report: called in a thread of the process before it ends with code 1, because another one has been lost.

    Raises:
        OSError: the processes cannot connect.
    """
    connections = _accept(store, count - 1, timeout) if rank == 0 else [_connect(store, timeout)]
    watch = Watch(connections, report)
    watch.start()
    return watch


def _accept(store: dist.Store, count: int, timeout: float) -> list[socket.socket]:
    token = secrets.token_bytes(16)
    found: list[socket.socket] = []
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=count) as server:
        server.settimeout(timeout)
        store.set("watch", f"{server.getsockname()[1]} {token.hex()}")
        while len(found) < count:
            connection, _ = server.accept()
            connection.settimeout(10)
            with suppress(OSError):
                if secrets.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token):
                    found.append(connection)
                    continue
            connection.close()  # not one of ours
    return found


def _connect(store: dist.Store, timeout: float) -> socket.socket:
    port, token = store.get("watch").decode().split()
    connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout)
    connection.sendall(bytes.fromhex(token))
    return connection


class Watch(threading.Thread):
    """Ends this process when a connection closes without a goodbye. See `watch_processes`."""

    def __init__(self, connections: Sequence[socket.socket], report: Callable[[], None]):
        super().__init__(name="watch", daemon=True)
        self.connections, self.report, self.has_left = connections, report, False
        for connection in connections:
            connection.setblocking(True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a machine that is lost
            for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        # Processes that read images must not hold the connection of one that has died.
        os.register_at_fork(after_in_child=self._close)

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self.connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map() and not self.has_left:
                for key, _ in selector.select(timeout=1.0):
                    selector.unregister(key.fileobj)
                    if not _said_goodbye(key.fileobj) and not self.has_left:
                        self._end()

    def leave(self) -> None:
        """Say that this process ends, or goes on by itself."""
        self.has_left = True
        for connection in self.connections:
            with suppress(OSError):
                connection.sendall(GOODBYE)
        self._close()

    def _end(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # so that all others hear of it
        time.sleep(GRACE)
        if self.has_left:  # it was done, and writes its last files
            return
        with suppress(Exception):
            self.report()
        sys.stderr.flush()
        os._exit(1)

    def _close(self) -> None:
        for connection in self.connections:
            connection.close()


def _said_goodbye(connection) -> bool:
    try:
        return connection.recv(1) == GOODBYE
    except OSError:
        return False
