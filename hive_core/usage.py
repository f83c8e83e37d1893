"""What an answer of the provider says of its model and its tokens, read along as it streams."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hive_core.protocol.words import AgentName

COUNT_MOST = 2**40
MODEL_LIMIT = 100  # characters of a name
BYTES_PER_TOKEN = 3  # fewer than text has: what is estimated by them is rather too much


class UsageReader:
    """Reads along an answer, streaming or whole, in bounded memory. Its counts are right at any moment, so far.

    model  as the provider names it, with "-fast" behind it in fast mode, which has a price of its own; None until then
    size   bytes so far
    usage  token counts by kind, the last word of each; one of an object within has its name behind a dot, such as
           cache_creation.ephemeral_1h_input_tokens. A stream begins with a first count of `output_tokens`, which says
           nothing of how many come: until the last one has come `estimated_output_tokens` stands in its place, by the
           size of what was streamed.
    """

    _KEPT_BYTES = 512 * 1024
    _DELTA = b'"content_block_delta"'
    _DELTA_FRAME_BYTES = 80  # of a line that brings some text, around the text
    _MUCH_TOKENS = 1000

    def __init__(self) -> None:
        self.model: str | None = None
        self.size = 0
        self._usage: dict[str, int] = {}
        self._rest = b""
        self._streamed_tokens = 0
        self._output_told = False
        self._told = 0  # how often it told counts

    @property
    def usage(self) -> dict[str, int]:
        if self._output_told or not self._usage:
            return self._usage
        told = {kind: count for kind, count in self._usage.items() if kind != "output_tokens"}
        return {**told, "estimated_output_tokens": max(self._streamed_tokens, self._usage.get("output_tokens", 0))}

    def feed(self, data: bytes) -> bool:
        """Read on; whether `usage` is another one now, or has grown by much."""
        self.size += len(data)
        before = self._told + self._streamed_tokens // self._MUCH_TOKENS
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-self._KEPT_BYTES :]
        for line in lines:
            self._read(line)
        return self._told + self._streamed_tokens // self._MUCH_TOKENS != before

    def end(self) -> dict[str, int]:
        """`usage` behind the last byte; empty when the answer told none."""
        self._read(self._rest)
        self._rest = b""
        return self.usage

    def _read(self, line: bytes) -> None:
        if self._DELTA in line:
            self._streamed_tokens += 1 + max(0, len(line) - self._DELTA_FRAME_BYTES) // BYTES_PER_TOKEN
        if b'"usage"' not in line:
            return
        try:
            event = json.loads(line.removeprefix(b"data:"))
            begins = not event.get("usage")
            answer = event["message"] if begins else event
            counts = dict(_counts(answer["usage"]))
            model, fast = answer.get("model"), answer["usage"].get("speed") == "fast"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        if isinstance(model, str) and model:
            self.model = model[:MODEL_LIMIT].encode("utf-8", "replace").decode()
        if fast and self.model is not None:
            self.model = self.model.removesuffix("-fast") + "-fast"
        self._usage.update(counts)
        self._told += 1
        self._output_told = self._output_told or (not begins and "output_tokens" in counts)


def _counts(told: dict[str, Any], within: str = "") -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for kind, count in told.items():
        if isinstance(count, dict) and not within:
            found += _counts(count, f"{kind}.")
        elif isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= COUNT_MOST:
            found.append((f"{within}{kind}", count))
    return found


@dataclass(eq=False, slots=True)
class Call:
    """One call to the provider, from before its first byte went there until after the last one came back.

    credential     its name, from when there is one
    request_bytes  as its headers announce them, until all have come
    reached        the provider has it, or may have: it was cut before anybody could know
    status         of the provider's answer; 0 when there is none
    complete       the answer was passed on to its end
    """

    agent: AgentName
    path: str
    request_bytes: int = 0
    credential: str = ""
    reached: bool = False
    status: int = 0
    complete: bool = False
    reader: UsageReader = field(default_factory=UsageReader)

    @property
    def model(self) -> str | None:
        return self.reader.model

    @property
    def usage(self) -> dict[str, int] | None:
        """Token counts by kind as the provider told them last; None when it has told none."""
        return self.reader.usage or None
