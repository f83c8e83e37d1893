"""A message as an agent reads it: a header of the hive's words, then the body behind a mark that it cannot escape.

Everything outside the marked lines is the hive's word, everything behind "> " the sender's. Standard library alone.
"""

from __future__ import annotations

import re

from hive_core.protocol.visible import quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hive_core.protocol.harness import AttachedFile, LeasedMessage

MARK = "> "
FILES_PLACE = "/state/inbox"  # where an agent finds the files of a message, in a folder by its number
# Whatever any reader takes for the end of a line, so that no line of a body can start without its mark.
LINE_END = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
LAST_OF_HEADER = 'body, each line of it behind "> ":\n'


def framed(message: LeasedMessage, more: Sequence[str] = ()) -> str:
    """The message in its frame; `more` are further lines of its header."""
    number, body, body_bytes = message["id"], message["body"], message.get("body_bytes")
    called = f" ({quoted(pronouns)})" if (pronouns := message.get("pronouns")) else ""
    header = [f"from: {message['sender']}{called}", f"message: {number}"]
    if message["in_reply_to"] is not None:
        header.append(f"in_reply_to: {message['in_reply_to']}")
    if message["attempt"] > 1:
        header.append(
            f"delivered again (attempt {message['attempt']}): a turn with it did not end well; see what is done already"
        )
    header += more
    header += [_file(one, f"{FILES_PLACE}/{number}") for one in message.get("files", ())]
    if body_bytes is not None:
        here = len(body.encode("utf-8", "replace"))
        header.append(
            f"size: {body_bytes} bytes, of which the first {here} stand here; `read_body` with id={number} and "
            f"offset={here} reads on"
        )
    return "\n".join(header) + "\n" + LAST_OF_HEADER + marked(body)


def _file(file: AttachedFile, folder: str) -> str:
    """One line for a file that came with a message."""
    size = f"({file['type']}, {file['bytes']:,} bytes)"
    if why := file.get("missing"):
        return f"file: {quoted(file['name'])} {size} is missing: {quoted(why)}"
    return f"file: {quoted(file.get('path') or folder + '/' + file['name'])} {size}"


def marked(text: str) -> str:
    """The text with the mark before each of its lines, whatever ends them."""
    return "".join(f"{MARK}{line}\n" for line in LINE_END.split(text))
