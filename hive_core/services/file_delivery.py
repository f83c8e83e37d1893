"""Attached files on their way to agents: laid into /state/inbox/MESSAGE for the turn that is handed the message.

They go when the message does. What stands in an agent's /state is the agent's: nothing in it is followed, and what is
in the way costs the agent that file alone. The message comes all the same and says what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import trio

from hive_core.protocol.frame import FILES_PLACE
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.services.bodies import FILE_PIECE_BYTES, open_kept
from hive_core.store.door import Store
from hive_core.store.errors import StoreError
from hive_core.trees import open_folder, remove_tree

log = logging.getLogger(__name__)

AT_ONCE = 4
SWEPT_MOST = 10_000  # folders of one agent; what is more goes an hour later
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE = FILES_PLACE.rpartition("/")[2]


class FileDelivery:
    """bare: agents have no sandbox, and see their /state where it is."""

    def __init__(self, store: Store, state_dir: Path, bare: bool = False) -> None:
        self._store = store
        self._agents = state_dir / "agents"
        self._bodies = state_dir / "bodies"
        self._bare = bare
        self._at_once = trio.CapacityLimiter(AT_ONCE)

    async def lay(self, agent: AgentName, message: dict[str, Any]) -> dict[str, Any]:
        """The message as the agent gets it, with its files in place: each with its `path`, or why it is `missing`.

        Files that were there are as they were sent again. It cannot be cancelled: the message is leased already.
        """
        if not message.get("files"):
            return message
        with trio.CancelScope(shield=True):
            told = await trio.to_thread.run_sync(self._lay, agent, message, limiter=self._at_once)
            if missing := {one["name"]: one["missing"] for one in told if "missing" in one}:
                log.warning("files of message %d did not reach %s: %s", message["id"], agent, missing)
                with suppress(StoreError):
                    about = {"about": message["id"], "message": message["id"], "missing": missing}
                    await self._store.write(lambda tx: tx.emit("files_missing", SYSTEM, agent, **about))
        return {**message, "files": told}

    async def sweep(self) -> int:
        """Remove the folders in agents' /state/inbox whose message is gone; how many went."""
        removed = 0
        for name in await trio.to_thread.run_sync(self._names):
            there = await trio.to_thread.run_sync(self._laid, name)
            sql = """
                SELECT value FROM json_each(?) WHERE value NOT IN (
                    SELECT a.message_id FROM attachments a JOIN deliveries d USING (message_id) WHERE d.recipient = ?
                ) AND value <= (SELECT max(seq) FROM sqlite_sequence WHERE name = 'messages')
            """
            gone = [row[0] for row in await self._store.rows(sql, (str(there), name))] if there else []
            removed += await trio.to_thread.run_sync(self._remove, name, gone) if gone else 0
        if removed:
            log.info("removed the files of %s from agents' /state/inbox", counted(removed, "old message"))
        return removed

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self._agents))
        return []

    def _lay(self, agent: AgentName, message: dict[str, Any]) -> list[dict[str, Any]]:
        seen = f"{self._agents}/{agent}{FILES_PLACE}" if self._bare else FILES_PLACE
        folder_seen = f"{seen}/{message['id']}"
        told = [{key: file[key] for key in ("name", "type", "bytes")} for file in message["files"]]
        try:
            with self._folder(agent, str(message["id"])) as folder:
                for one, file in zip(told, message["files"], strict=True):
                    try:
                        self._lay_one(folder, file)
                        one["path"] = f"{folder_seen}/{file['name']}"
                    except OSError as exc:
                        one["missing"] = _why(exc)
                    except Refusal as refusal:
                        one["missing"] = refusal.message
        except OSError as exc:
            return [{**one, "missing": f"{folder_seen}: {_why(exc)}"} for one in told]
        return told

    def _lay_one(self, folder: int, file: dict[str, Any]) -> None:
        temporary = f".new-{secrets.token_hex(8)}"
        with open_kept(self._bodies, file["sha256"]) as kept:
            descriptor = os.open(temporary, _MAKE, 0o600, dir_fd=folder)
            try:
                with open(descriptor, "wb", buffering=0) as laid:
                    _copy(kept, laid, file["sha256"])
                os.rename(temporary, file["name"], src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    @contextlib.contextmanager
    def _inbox(self, agent: str, make: bool = False) -> Iterator[int]:
        with _opened(self._agents / agent / "state") as state, _opened(_PLACE, state, make) as inbox:
            yield inbox

    @contextlib.contextmanager
    def _folder(self, agent: str, message: str) -> Iterator[int]:
        with self._inbox(agent, make=True) as inbox, _opened(message, inbox, make=True) as folder:
            yield folder

    def _laid(self, agent: str) -> list[int]:
        """The numbers of the messages that have a folder there."""
        with suppress(OSError), self._inbox(agent) as inbox, os.scandir(inbox) as entries:
            numbers = (int(entry.name) for entry in entries if _NUMBER.fullmatch(entry.name))
            return list(islice(numbers, SWEPT_MOST))
        return []

    def _remove(self, agent: str, numbers: list[int]) -> int:
        removed = 0
        with suppress(OSError), self._inbox(agent) as inbox:
            for number in numbers:
                with suppress(OSError):  # it is there for the next sweep
                    remove_tree(str(number), inbox)
                    removed += 1
        return removed


@contextlib.contextmanager
def _opened(name: str | Path, folder: int | None = None, make: bool = False) -> Iterator[int]:
    """A directory; `make`: which is made where nothing stands there."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=folder)
    descriptor = open_folder(name, folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _copy(kept: BinaryIO, laid: Any, sha256: str) -> None:
    """Raises Refusal when what is kept is not what was sent."""
    digest = hashlib.sha256()
    while data := kept.read(FILE_PIECE_BYTES):
        digest.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[laid.write(rest) :]
    if digest.hexdigest() != sha256:
        raise Refusal("unavailable", "the hive's own copy was changed on its disk; ask for it again")


def _why(error: OSError) -> str:
    return explain(OSError(error.errno, error.strerror))
