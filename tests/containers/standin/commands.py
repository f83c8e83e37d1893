"""The commands of a stand-in NixOS host: `python commands.py HOST nixos-container|systemctl|journalctl WORD …`.

Written from what nixos-container and its units do, with what surprises in it: `create` assigns addresses, which force a
network link unless they are cleared; a name has at most 11 characters; `run` needs the unit to run and gives a
terminal's line ends; a drop-in counts once systemd was told to read it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hive_core.containers.process_tree import first_in_namespace, start_time
from tests.containers.standin.state import Host, Journal, parse_settings

STOP_WITHIN_S = 5.0  # TimeoutStopSec=, of which systemd has 90 s
START_WITHIN_S = 60.0
_LOOK_S = 0.01


class Failed(Exception):
    pass


def machine_of(unit: str) -> str:
    match = re.fullmatch(r"container@(.+?)(\.service)?", unit)
    if match is None:
        raise Failed(f"Unit {unit} could not be found.")
    return match[1]


class Systemctl:
    def __init__(self, host: Host) -> None:
        self.host = host

    def main(self, words: Sequence[str]) -> None:
        verb, *rest = words
        options, units = [word for word in rest if word.startswith("--")], [w for w in rest if not w.startswith("--")]
        if verb == "daemon-reload":
            self.host.reload()
        elif verb == "show":
            wanted = next((option.partition("=")[2].split(",") for option in options if "property" in option), None)
            for key, value in self.host.state(machine_of(units[0])).items():
                if wanted is None or key in wanted:
                    print(f"{key}={value}")
        elif verb == "reset-failed":
            if self.host.state(machine_of(units[0]))["ActiveState"] == "failed":
                self.host.forget(machine_of(units[0]))
        elif verb in ("start", "stop", "reload"):
            getattr(self, verb)(machine_of(units[0]))
        else:
            raise Failed(f"Unknown command verb {verb}.")

    def start(self, machine: str) -> None:
        with self.host.locked(f"start-{machine}"):
            if self._active(machine) == "deactivating":
                self._wait(machine, "inactive", "failed")
            if self._active(machine) in ("inactive", "failed"):
                self.host.stop_file(machine).unlink(missing_ok=True)
                self.host.set_state(machine, "activating", 0, "")
                self._fork(machine)
        if self._wait(machine, "active", "inactive", "failed") != "active":
            raise Failed(
                f"Job for container@{machine}.service failed because the control process exited with error code."
            )

    def _fork(self, machine: str) -> None:
        """Have a process run the unit that is nobody's child."""
        if child := os.fork():
            os.waitpid(child, 0)
            return
        os.setsid()
        if os.fork():
            os._exit(0)
        said = os.open(self.host.folder / "run/unit.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDWR)
        for number, fd in enumerate((null, null, said)):
            os.dup2(fd, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        from tests.containers.standin.unit import Unit

        try:
            Unit(self.host, machine).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(0)

    def stop(self, machine: str) -> None:
        with self.host.locked(f"start-{machine}"):  # whoever starts it has begun it by then, or was killed before
            self.host.stop_file(machine).touch()
        if pid := self._main_pid(machine):
            _signal(pid, signal.SIGTERM)
            if self._wait(machine, "inactive", "failed", within_s=STOP_WITHIN_S) is None:
                _signal(pid, signal.SIGKILL)
                self._wait(machine, "inactive", "failed")

    def reload(self, machine: str) -> None:
        conf = parse_settings(self.host.conf_file(machine))
        system = conf.get("SYSTEM_PATH") or "/nix/var/nix/profiles/system"
        try:
            NixosContainer(self.host).run(machine, [f"{system}/bin/switch-to-configuration", "test"])
        except SystemExit as exit_:
            if exit_.code:
                raise Failed(f"Job for container@{machine}.service failed.") from None

    def state(self, machine: str) -> dict[str, str]:
        return self.host.state(machine)

    def _main_pid(self, machine: str) -> int:
        """Of a unit that has just begun it is told a moment later; 0 of one that does not run."""
        end = time.monotonic() + START_WITHIN_S
        while (state := self.state(machine))["ActiveState"] == "activating" and state["MainPID"] == "0":
            if time.monotonic() > end:  # who was to begin it was killed before
                self.host.set_state(machine, "inactive", 0, "")
                return 0
            time.sleep(_LOOK_S)
        return int(state["MainPID"])

    def _active(self, machine: str) -> str:
        return self.state(machine)["ActiveState"]

    def _wait(self, machine: str, *states: str, within_s: float = START_WITHIN_S) -> str | None:
        end = time.monotonic() + within_s
        while (now := self._active(machine)) not in states:
            if time.monotonic() > end:
                return None
            time.sleep(_LOOK_S)
        return now


class RealSystemctl(Systemctl):
    """The machine's own systemd, where it runs a container@.service."""

    def state(self, machine: str) -> dict[str, str]:
        import subprocess

        words = ["systemctl", "show", "--property=ActiveState,MainPID", f"container@{machine}.service"]
        said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        return dict(line.split("=", 1) for line in said.splitlines())

    def start(self, machine: str) -> None:
        self._ask("start", machine)

    def stop(self, machine: str) -> None:
        self._ask("stop", machine)

    def reload(self, machine: str) -> None:
        self._ask("reload", machine)

    def _ask(self, verb: str, machine: str) -> None:
        if os.spawnlp(os.P_WAIT, "systemctl", "systemctl", verb, f"container@{machine}.service"):
            raise Failed(f"failed to {verb} container")


class NixosContainer:
    def __init__(self, host: Host, systemctl: Systemctl | None = None) -> None:
        self.host = host
        self.systemctl = systemctl or Systemctl(host)

    def main(self, words: Sequence[str]) -> None:
        own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        options, plain, given = {}, [], iter(own)
        for word in given:
            if word.startswith("--"):
                options[word] = next(given) if word in ("--system-path", "--flake") else ""
            else:
                plain.append(word)
        verb = plain[0] if plain else ""
        if verb == "list":
            for conf in sorted(self.host.confs.glob("*.conf")):
                print(conf.stem)
            return
        if len(plain) < 2:
            raise Failed("no container name specified")
        machine = plain[1]
        if not re.fullmatch(r"[a-zA-Z0-9_-]+", machine):
            raise Failed("invalid container name")
        if verb == "create":
            self.create(machine, options)
        elif not self.host.conf_file(machine).exists():
            if verb == "destroy":
                return
            if verb == "status":
                print("gone")
            raise Failed(f"container '{machine}' does not exist")
        elif verb == "run":
            self.run(machine, command)
        elif verb in (
            "update",
            "destroy",
            "start",
            "stop",
            "terminate",
            "restart",
            "status",
            "show-ip",
            "show-host-key",
        ):
            getattr(self, verb.replace("-", "_"))(*([machine, options] if verb == "update" else [machine]))
        else:
            raise Failed(f"unknown action '{verb}'")

    def create(self, machine: str, options: dict[str, str]) -> None:
        conf = self.host.conf_file(machine)
        with self.host.locked("nixos-container"):
            if conf.exists():
                raise Failed(f"container '{machine}' already exists")
            if len(machine) > 11:
                raise Failed(f"container name '{machine}' is too long")
            used = "".join(other.read_text() for other in self.host.confs.glob("*.conf"))
            number = next(number for number in range(1, 255) if f"=10.233.{number}." not in used)
            addresses = [f"HOST_ADDRESS=10.233.{number}.1", f"LOCAL_ADDRESS=10.233.{number}.2"]
            lines = ["PRIVATE_NETWORK=1", *addresses, "HOST_BRIDGE=", "HOST_PORT=", "AUTO_START=0"]
            lines += [f"FLAKE={options['--flake']}"] if "--flake" in options else []
            conf.write_text("\n".join(lines) + "\n")
        print(f"host IP is 10.233.{number}.1, container IP is 10.233.{number}.2", file=sys.stderr)
        self._profile(machine).parent.mkdir(parents=True, exist_ok=True)
        if not self._set(machine, options.get("--system-path") or self._build(options["--flake"])):
            self._clear(machine)
            raise Failed("failed to set initial container configuration")

    def update(self, machine: str, options: dict[str, str]) -> None:
        """From a flake: --system-path is not for this one."""
        flake = options.get("--flake") or parse_settings(self.host.conf_file(machine)).get("FLAKE")
        if flake is None:
            raise Failed("failed to build container configuration")
        if not self._set(machine, self._build(flake)):
            raise Failed("failed to set container configuration")
        if self.systemctl.state(machine)["ActiveState"] == "active":
            print("reloading container...", file=sys.stderr)
            self.systemctl.reload(machine)

    def start(self, machine: str) -> None:
        self.systemctl.start(machine)

    def stop(self, machine: str) -> None:
        self.systemctl.stop(machine)

    def restart(self, machine: str) -> None:
        self.stop(machine)
        self.start(machine)

    def terminate(self, machine: str) -> None:
        leader = self._leader(machine)
        _signal(leader, signal.SIGKILL)
        while start_time(leader) is not None:
            time.sleep(_LOOK_S)

    def status(self, machine: str) -> None:
        print("up" if self.systemctl.state(machine)["ActiveState"] == "active" else "down")

    def destroy(self, machine: str) -> None:
        if self.systemctl.state(machine)["ActiveState"] == "active":
            self.terminate(machine)
        self._clear(machine)

    def run(self, machine: str, command: Sequence[str]) -> None:
        import subprocess

        leader = self._leader(machine)
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in command)
        words = [
            "nsenter",
            f"--target={leader}",
            "--user",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--root",
            "--wd",
        ]
        path = "PATH=/run/current-system/sw/bin:/usr/bin:/bin"
        words += ["--", "/usr/bin/env", "-i", path, "HOME=/root", "/bin/sh", "-lc", f"exec {quoted}"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        sys.stdout.buffer.write(done.stdout.replace(b"\n", b"\r\n"))
        sys.stdout.flush()
        raise SystemExit(done.returncode)

    def show_ip(self, machine: str) -> None:
        address = parse_settings(self.host.conf_file(machine)).get("LOCAL_ADDRESS", "")
        if not address:
            raise Failed("cannot get IP address")
        print(address)

    def show_host_key(self, machine: str) -> None:
        key = self.host.root_of(machine) / "etc/ssh/ssh_host_ed25519_key.pub"
        if not key.exists():
            raise SystemExit(1)
        print(key.read_text())

    def _leader(self, machine: str) -> int:
        leader = first_in_namespace(int(self.systemctl.state(machine)["MainPID"]) or os.getpid())
        if leader is None:
            raise Failed("unable to get container's main PID")
        return leader

    def _build(self, flake: str) -> str:
        url, _, name = flake.partition("#")
        attribute = f'{url}#nixosConfigurations."{name or "container"}".config.system.build.toplevel'
        link = self.host.folder / "run" / f"built.{os.getpid()}"
        if os.spawnlp(os.P_WAIT, "nix", "nix", "build", "-o", str(link), attribute):
            raise Failed(f"failed to build container from flake '{url}'")
        built = os.readlink(link)
        link.unlink()
        return built

    def _set(self, machine: str, system: str) -> bool:
        words = ["nix-env", "-p", str(self._profile(machine)), "--set", system]
        return os.spawnvp(os.P_WAIT, words[0], words) == 0

    def _profile(self, machine: str) -> Path:
        return self.host.nix / "var/nix/profiles/per-container" / machine / "system"

    def _clear(self, machine: str) -> None:
        import shutil

        shutil.rmtree(self._profile(machine).parent, ignore_errors=True)
        shutil.rmtree(self.host.nix / "var/nix/gcroots/per-container" / machine, ignore_errors=True)
        shutil.rmtree(self.host.root_of(machine), ignore_errors=True)
        self.host.conf_file(machine).unlink()
        self.host.forget(machine)


def journalctl(host: Host, words: Sequence[str]) -> None:
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    matches = dict(word.split("=", 1) for word in words if not word.startswith("--"))
    units = [options["unit"]] if "unit" in options else [file.name for file in (host.folder / "run/journal").glob("*")]
    since, found = float(options.get("since", "@0").removeprefix("@")), []
    of_systemd = matches.get("_PID") == "1"
    invocation = matches.get("INVOCATION_ID") or matches.get("_SYSTEMD_INVOCATION_ID")
    for unit in units:
        for entry in Journal(host, unit).read():
            by_systemd = bool(entry["by_systemd"])
            if (invocation and (entry["invocation"] != invocation or by_systemd != of_systemd)) or entry["at"] < since:  # type: ignore[operator]
                continue
            found.append(str(entry["text"]))
    for text in found[-int(options.get("lines", "1000")) :]:
        print(text)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(folder: str, program: str, *words: str) -> None:
    host = Host(Path(folder))
    try:
        if program == "journalctl":
            journalctl(host, words)
        elif program == "nixos-container-of-systemd":
            NixosContainer(host, RealSystemctl(host)).main(words)
        else:
            {"nixos-container": NixosContainer, "systemctl": Systemctl}[program](host).main(words)
    except Failed as failed:
        sys.exit(f"{program}: {failed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
