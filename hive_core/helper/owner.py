"""The daemon's user: whose requests are carried out, and whose directories agents get."""

from __future__ import annotations

import pwd
import shutil
from dataclasses import dataclass

from hive_core.protocol.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Owner:
    uid: int
    gid: int

    @classmethod
    def named(cls, word: str) -> Owner:
        """The user of a name, or of a number that nobody has. Raises Refusal."""
        try:
            entry = pwd.getpwuid(int(word)) if word.isdecimal() else pwd.getpwnam(word)
        except KeyError:
            if word.isdecimal():
                return cls(int(word), int(word))
            fix = "make it (nix/systemd/hyperhive.sysusers.conf), or set helper_user to the daemon's"
            raise Refusal("usage", f"cannot serve {word}: there is no such user; {fix}") from None
        return cls(entry.pw_uid, entry.pw_gid)

    def become(self) -> list[str]:
        """What a command is given to, so that it has this user's rights and no others, now and later."""
        if self.uid == 0:
            return []
        program = shutil.which("setpriv") or "setpriv"
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return [program, *ids, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
