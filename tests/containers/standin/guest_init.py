"""Process 1 of a stand-in NixOS system: its activation, and nix/agent/service.nix as a unit of its.

Put into the store with HARNESS replaced by the unit's command. What it prints goes to the console as systemd has it
for StandardOutput=journal+console, and its end is the container's (SuccessAction=exit, FailureAction=exit).
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys

SYSTEM = os.path.dirname(os.path.realpath(sys.argv[0]))
HARNESS: list[str] = []
REBOOT = 133  # a harness that ends with it stands for the system's root, who reboots it


def main() -> None:
    subprocess.run([f"{SYSTEM}/activate"], check=False)
    asked = signal.SIGRTMIN + 3
    signal.pthread_sigmask(signal.SIG_BLOCK, {asked, signal.SIGCHLD})
    ours, theirs = socket.socketpair()  # as journald's is
    harness = subprocess.Popen(
        HARNESS,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd="/state",
        env={},
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {asked, signal.SIGCHLD}),
    )
    theirs.close()
    with open("/run/hive-agent.pid", "w") as file:
        file.write(str(harness.pid))
    console = os.fork()
    if console == 0:
        copy_to_console(ours, f"hive-agent[{harness.pid}]: ".encode())
        os._exit(0)
    ours.close()
    tell_ready()
    code = None
    while code is None:
        if signal.sigwait({asked, signal.SIGCHLD}) == asked:
            os.kill(harness.pid, signal.SIGTERM)
            asked_to_halt.append(True)
        code = reap(harness.pid)
    # What it left is killed, and what it had printed is told.
    kill_others(console)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(console, 0)
    if code == REBOOT:
        ctypes.CDLL(None).reboot(0x01234567)
    os._exit(0 if asked_to_halt else code)


asked_to_halt: list[bool] = []


def reap(harness: int) -> "int | None":
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == harness:
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


def kill_others(console: int) -> None:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (1, console):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry), signal.SIGKILL)


def copy_to_console(source: socket.socket, prefix: bytes) -> None:
    rest = b""
    while piece := source.recv(65536):
        *lines, rest = (rest + piece).split(b"\n")
        text = b"".join(prefix + line + b"\n" for line in lines)
        while text:
            text = text[os.write(1, text) :]
    if rest:
        os.write(1, prefix + rest + b"\n")


def tell_ready() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


if __name__ == "__main__":
    main()
