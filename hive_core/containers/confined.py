"""Runs a command with an agent's rights: no capability, no new ones, our filter of system calls, no foreign setting.

Run by its path inside a container, by whatever was just put there and still may do more:

    python -I -S confined.py [OPTION …] -- COMMAND …

or outside of one, to enter it first. Whoever enters has every right in there until it has given them up, and what is
in there is the agent's by then, the interpreter's place and the loader's too: so nothing of it is run before.

    --enter PID       be in the container of a process from now on, in every way; as its root
    --enter-as-is PID  the same, as the user that it is
    --empty DIR       put an empty, read-only directory over one
    --read-only PATH  nothing below it can be written; of /, nothing that has no other place mounted there
    --hide FILE       put /dev/null over a file
    --no-namespaces   nobody in here can make a user namespace
    --link PATH TO    make a link where nothing is yet
    --output-of-stdout  what it prints goes where descriptor 1 goes; descriptor 0 becomes 3, but for a device
    --filter HEX      a classic BPF program
    --chdir DIR
    --env NAME=VALUE  its environment is these alone

It ends when the process that it comes from does. It imports little: an agent's start waits for it. A command that is
`python -P -m MODULE …` runs in this interpreter, when this one was started with -P too, and not with -I -S.
"""

import ctypes
import os
import stat
import sys

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 32, 4096, 16384
_MNT_DETACH = 2
_QUIET = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 22, 24, 38, 47
_NAMESPACES = ("user", "mnt", "pid", "ipc", "net", "uts", "cgroup")
_NS_GET_USERNS = 0xB701
_CAPABILITIES_V3 = 0x20080522
_SIGKILL = 9
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine(words: list[str]) -> None:
    """Do what the options say, in their order, give up every right, and become the command."""
    environment: dict[str, str] = {}
    program = b""
    given = iter(words)
    for option in given:
        if option == "--":
            break
        if option in ("--enter", "--enter-as-is"):
            _enter(int(next(given)), become_root=option == "--enter")
        elif option == "--empty":
            _empty(next(given))
        elif option == "--read-only":
            _read_only(next(given))
        elif option == "--hide":
            _hide(next(given))
        elif option == "--no-namespaces":
            _no_namespaces()
        elif option == "--link":
            _link(next(given), next(given))
        elif option == "--output-of-stdout":
            _arrange_descriptors()
        elif option == "--filter":
            program = bytes.fromhex(next(given))
        elif option == "--chdir":
            os.chdir(next(given))
        elif option == "--env":
            name, _, value = next(given).partition("=")
            environment[name] = value
        else:
            raise SystemExit(f"confined.py: there is no option {option}")
    command = list(given)
    _give_up_rights(program)
    if command[:3] == [sys.executable, "-P", "-m"] and sys.flags.safe_path and not sys.flags.isolated:
        _become_module(command[3:], environment)
    else:
        os.execvpe(command[0], command, environment)


def _enter(pid: int, *, become_root: bool) -> None:
    _run_from_memory()
    place = f"/proc/{pid}"
    user, *others = [os.open(f"{place}/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]
    # One that is ours already, as the host's network may be, lets nobody in who has no rights over it.
    known = [os.stat(f"/proc/self/ns/{kind}") for kind in _NAMESPACES[1:]]
    namespaces = [one for one, here in zip(others, known, strict=True) if not os.path.samestat(here, os.fstat(one))]
    root = os.open(f"{place}/root", os.O_PATH | os.O_DIRECTORY)
    ours = os.stat("/proc/self/ns/user")
    # Its number may be another's by now. What is not in a container would give whoever is handed the command the host.
    if os.path.samestat(ours, os.fstat(user)):
        raise SystemExit(f"hive: process {pid} is in no container (any more)")
    # Who has privileges here would lose them with the user namespace, and who has none gets them in the one that the
    # others belong to: bwrap makes another below it.
    if left := [namespace for namespace in namespaces if _libc.setns(namespace, 0) < 0]:
        owner = _libc.ioctl(left[0], _NS_GET_USERNS)
        for namespace in (owner, *left):
            _checked(_libc.setns(namespace, 0), "cannot enter the container")
        ours = os.fstat(owner)
    os.fchdir(root)
    os.chroot(".")
    if not os.path.samestat(ours, os.fstat(user)):
        _checked(_libc.setns(user, 0), "cannot enter the container's users")
    if child := os.fork():  # only what is born now is in the pid namespace
        _end_as(os.waitpid(child, 0)[1])
    if become_root:
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)


def _run_from_memory() -> None:
    """Be a copy of this program that nobody can write: in the container /proc/PID/exe leads to the host's otherwise."""
    import fcntl

    if os.readlink("/proc/self/exe").startswith("/memfd:"):
        return
    copy = os.memfd_create("hive", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open("/proc/self/exe", "rb") as program:
        while os.sendfile(copy, program.fileno(), None, 1 << 30):
            pass
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    os.execve(copy, [sys.executable, *sys.orig_argv[1:]], os.environ)


def _end_as(status: int) -> None:
    """End as a child has ended."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _become_module(command: list[str], environment: dict[str, str]) -> None:
    """Run a module of Python's in this very interpreter, which was started as another would be: that is saved."""
    import runpy

    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _checked(done: int, what: str) -> None:
    if done < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, f"{what}: {os.strerror(reason)}")


def _mount(source: str, target: str, kind: "str | None", flags: int) -> None:
    kind_bytes = None if kind is None else kind.encode()
    done = _libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), None)
    _checked(done, f"cannot mount {target}")


def _empty(folder: str) -> None:
    if os.path.isdir(folder):
        _mount("tmpfs", folder, "tmpfs", _MS_RDONLY | _QUIET)


def _read_only(path: str) -> None:
    if path == "/":  # what is put over it nobody sees; its flags stay, of which some cannot be taken away
        _mount(path, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | os.statvfs(path).f_flag & _QUIET)
    elif os.path.exists(path):
        _mount(path, path, None, _MS_BIND | _MS_REC)
        _mount(path, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _QUIET)


def _hide(file: str) -> None:
    _libc.umount2(file.encode(), _MNT_DETACH)  # what is mounted there and deleted, nothing can be mounted over
    _mount("/dev/null", file, None, _MS_BIND)
    _mount("/dev/null", file, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _QUIET)


def _no_namespaces() -> None:
    # It is read-only, but for what lies under it.
    _libc.umount2(b"/proc/sys", _MNT_DETACH)
    with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as limit:
        limit.write("0")


def _link(path: str, target: str) -> None:
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)


def _arrange_descriptors() -> None:
    if not stat.S_ISCHR(os.fstat(0).st_mode):
        os.dup2(0, 3)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(1, 2)


def _give_up_rights(program: bytes) -> None:
    zero = ctypes.c_ulong(0)

    def control(option: int, value: int, more: object = zero) -> int:
        return int(_libc.prctl(option, ctypes.c_ulong(value), more, zero, zero))

    _checked(control(_PR_SET_NO_NEW_PRIVS, 1), "cannot refuse new privileges")
    control(_PR_CAP_AMBIENT, 4)
    number = 0
    while control(_PR_CAPBSET_DROP, number) == 0:
        number += 1
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "cannot drop capabilities")
    if program:
        filtered = _Program(len(program) // 8, program)
        _checked(control(_PR_SET_SECCOMP, 2, ctypes.byref(filtered)), "cannot filter system calls")
    # Last: a change of rights takes it back.
    control(_PR_SET_PDEATHSIG, _SIGKILL)


if __name__ == "__main__":
    confine(sys.argv[1:])
