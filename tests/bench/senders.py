"""A client process of its own: N connections to host.sock, one send outstanding on each, until a count is reached.

Reads nothing but its arguments: RUNTIME_DIR COUNT and a recipient for each connection; prints {"sent", "seconds"}.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time


def main(runtime: str, count: int, recipients: list[str]) -> None:
    selector = selectors.DefaultSelector()
    for recipient in recipients:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{runtime}/host.sock")
        selector.register(sock, selectors.EVENT_READ, recipient)
    begun = answered = 0
    start = time.perf_counter()

    def send(sock: socket.socket, recipient: str) -> None:
        nonlocal begun
        body = f"{start:.6f} {begun} ".ljust(200, "x")
        begun += 1
        sock.sendall(json.dumps({"v": 1, "verb": "send", "args": {"to": recipient, "body": body}}).encode() + b"\n")

    for key in list(selector.get_map().values()):
        send(key.fileobj, key.data)  # type: ignore[arg-type]
    while answered < count:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            answer = sock.recv(4096)
            assert json.loads(answer)["ok"], answer
            answered += 1
            if begun < count:
                send(sock, key.data)
    print(json.dumps({"sent": answered, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
