"""Words of a command line, checked as they are read. Standard library alone.

argparse is imported by whoever reads arguments, not with this file: `hive` has 100 ms for its whole start.
"""

from __future__ import annotations

import os
import stat

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable
    from typing import NoReturn


def parser_class(help_of: str = "") -> type[ArgumentParser]:
    """An ArgumentParser that raises Refusal("usage"), one line for what is wrong, in the place of its whole usage.

    help_of: the command whose --help says more, where it is not the parser's own.
    """
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            from hive_core.protocol.visible import named

            more = f"`{help_of or self.prog} --help` says more"
            raise Refusal("usage", f"cannot read the arguments: {named(message)[:300]}; {more}")

    return Parser


def seconds(such_as: int) -> Callable[[str], float]:
    """For an argument that is a time in seconds, any that is finite; `such_as` is the example of its complaint."""

    def parse(text: str) -> float:
        from argparse import ArgumentTypeError

        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise ArgumentTypeError(f"{shown(text)} is not a number of seconds, such as {such_as}")
        return number

    return parse


def life_fd(text: str) -> int:
    """The descriptor whose other end is the life of whoever starts us: a file would never say that it is over."""
    from argparse import ArgumentTypeError

    try:
        number = int(text)
        mode = os.fstat(number).st_mode
    except (ValueError, OverflowError, OSError):
        mode = 0
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise ArgumentTypeError(f"{shown(text)} is not the number of a pipe or socket that is open here")
    return number
