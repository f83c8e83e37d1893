"""Whether the harness in a container that runs can still be spoken with."""

from __future__ import annotations

import trio

HELLO_WITHIN = 5.0  # a machine that starts a hundred agents at once is slow; one that never comes is hung
WORD_WITHIN = 1 / 6  # after its turn was taken away: one that was only stopped for a while goes on


class Silence:
    """Begins when a harness is not connected, has no turn and asks for none, or lost its turn since nothing was heard
    of it; any word ends it.

    limit_s   how long a harness may be silent before its turn is lost (`lease_silence_s`); the patience is in its terms
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.why = ""  # empty while it is heard
        self._patience_s = 0.0
        self._turned = trio.Event()
        self.not_connected()

    def not_connected(self) -> None:
        """Its connection is gone, or was never there."""
        patience_s = HELLO_WITHIN * self._limit_s
        self._turn(f"its harness was not connected for {patience_s:.0f} s", patience_s)

    def asks_nothing(self) -> None:
        """It is connected, and has neither a turn nor asked for one; or it was told to end."""
        patience_s = HELLO_WITHIN * self._limit_s
        self._turn(f"its harness asked for no turn for {patience_s:.0f} s", patience_s)

    def lost_turn(self) -> None:
        """Its turn was taken away: it said nothing for the limit."""
        self._turn(f"its harness said nothing for {self._limit_s:.0f} s and lost its turn", WORD_WITHIN * self._limit_s)

    def ended(self) -> None:
        """It was heard."""
        if self.why:
            self._turn("", 0.0)

    async def lasts(self) -> str:
        """Return why the harness counts as hung, once it does; its time runs from this call at the earliest."""
        while True:
            why, turned = self.why, self._turned
            with trio.move_on_after(self._patience_s if why else float("inf")) as patience:
                await turned.wait()
            if patience.cancelled_caught:
                return why

    def _turn(self, why: str, patience_s: float) -> None:
        self.why, self._patience_s = why, patience_s
        self._turned.set()
        self._turned = trio.Event()
