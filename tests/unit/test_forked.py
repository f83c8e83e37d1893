"""A forked daemon ends for all who wait for it."""

from __future__ import annotations

import socket
import threading

from tests.forked import ForkedDaemon

PID, CODE = 4_194_305, 7  # no process has that one


def test_two_threads_that_wait_for_one_daemon_both_hear_its_end() -> None:
    keeper, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keeper:
        keeper.send(str(PID).encode())
        daemon = ForkedDaemon(ours)
        heard: list[int] = []
        waiting = [threading.Thread(target=lambda: heard.append(daemon.wait(60))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        keeper.send(str(CODE).encode())
        for thread in waiting:
            thread.join(60)
    assert heard == [CODE, CODE]
    assert daemon.poll() == CODE
