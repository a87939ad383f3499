"""Three processes that wait in C, where Python runs neither exception handlers nor signal handlers.

Usage: python blocked.py VICTIM kills process VICTIM and prints the exit codes of all; with -1, all end in order.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from dgc_fastai.training import collectives, watch

COUNT = 3


def wait_in_c(library=ctypes.CDLL):
    """Wait for a lock that this thread has itself; no signal interrupts that."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        library(None).pthread_mutex_lock(mutex)


def one(rank, victim):
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    watch.GRACE, collectives.WATCHED_DEVICES = 0.5, ("cpu",)
    collectives.init_process_group(torch.device("cpu"))
    store = collectives._store
    ctypes.PyDLL(None).sleep(2)  # with Python's lock, as when a large file is saved
    store.add("ready", 1)
    with collectives.lost_processes_named("to go on: resume"):
        if victim >= 0:
            wait_in_c()
    time.sleep(rank)  # they do not end together
    collectives.destroy_process_group()


def main(victim):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(COUNT), TORCHELASTIC_USE_AGENT_STORE="True"
    )
    children = []
    for rank in range(COUNT):
        child = os.fork()
        if not child:
            one(rank, victim)
            sys.stderr.flush()
            os._exit(0)
        children.append(child)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # as torchrun keeps it
    if victim >= 0:
        group = f"{store.get('part').decode()}/ready"
        while store.add(group, 0) < COUNT:
            time.sleep(0.05)
        time.sleep(0.5)
        with suppress(ProcessLookupError):
            os.kill(children[victim], signal.SIGKILL)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main(int(sys.argv[1]))
