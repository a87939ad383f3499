"""A process that dies while the others wait where no handler runs, as for a GPU."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from dgc_fastai.training import collectives, watch
from helpers import ROOT

DEAD = -signal.SIGKILL


def run(victim):
    """The exit codes of three processes, and the lines on their error stream."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests/helpers/blocked.py"), str(victim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split())), done.stderr.splitlines()


@pytest.mark.parametrize("victim", [0, 2], ids=["the main process", "another one"])
def test_a_dead_process_ends_those_that_wait_in_c_with_one_line(victim):
    codes, lines = run(victim)
    assert codes == [DEAD if rank == victim else 1 for rank in range(3)]
    errors = [line for line in lines if line.startswith("error")]
    assert errors == ["error: another process of this run has died, or its machine has; to go on: resume"]


def test_processes_that_are_busy_or_end_at_different_times_are_not_dead():
    codes, lines = run(-1)
    assert codes == [0, 0, 0] and not any("error" in line for line in lines)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_process_that_needs_the_lost_one_no_more_ends_by_itself(monkeypatch, leaves):
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ended, reported = [], []
    monkeypatch.setattr(watch, "GRACE", 0.3)
    monkeypatch.setattr(os, "_exit", ended.append)
    one = watch.Watch([ours], lambda: reported.append(True))
    one.start()
    theirs.close()
    time.sleep(0.1)
    if leaves:
        one.leave()
    one.join(timeout=10)
    assert not one.is_alive()
    assert (ended, reported) == (([], []) if leaves else ([1], [True]))


def test_one_process_is_not_watched():
    before = threading.active_count()
    collectives.init_process_group(torch.device("cuda", 0))
    assert collectives._watch is None and threading.active_count() == before


def test_a_stranger_s_connection_is_refused():
    """Only who has read the token in the store is one of the run's processes."""

    class Store:
        def set(self, key, value):
            port, token = value.split()
            for content in (bytes(16), bytes.fromhex(token)):
                connection = socket.create_connection(("localhost", int(port)))
                connection.sendall(content)
                opened.append(connection)

    opened = []
    (accepted,) = watch._accept(Store(), 1, timeout=10)
    assert accepted.getpeername()[1] == opened[1].getsockname()[1]
    assert opened[0].recv(1) == b""  # closed
    for connection in (accepted, *opened):
        connection.close()
