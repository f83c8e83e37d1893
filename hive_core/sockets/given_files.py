"""Files that come with a request on host.sock: descriptors beside its line, named by its argument `files`.

Open files and not paths: what the operator may read the daemon may not, which is somebody else on most machines.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from hive_core.protocol.file_names import FILES_MOST, TOO_MANY, parse_file_name
from hive_core.protocol.refusal import Refusal
from hive_core.services.attachments import Upload

# Of the connection that is answered now: those that came and that nobody has taken yet.
descriptors: ContextVar[list[int]] = ContextVar("descriptors")


@contextmanager
def given_files(raw: object) -> Iterator[list[Upload]]:
    """The files of a request whose argument `files` is [{"name"}], each of which came with its descriptor, in order.

    Raises Refusal("usage") for what is no regular file, and where there are more names than descriptors.
    """
    if not isinstance(raw, list) or not all(isinstance(one, dict) and set(one) == {"name"} for one in raw):
        raise Refusal("usage", 'cannot take the files: `files` must be a list of {"name": …}')
    if len(raw) > FILES_MOST:
        raise Refusal("usage", f"cannot attach {len(raw):,} files: {TOO_MANY}")
    names, came = [parse_file_name(one["name"]) for one in raw], descriptors.get([])
    if len(names) != len(came):
        raise Refusal("usage", f"cannot take {len(names)} files: {len(came)} descriptors came; send one with each")
    with ExitStack() as opened:
        uploads = []
        for name in names:
            descriptor = came.pop(0)
            opened.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                why = "it is not a file; give a file, or an archive of a folder"
                raise Refusal("usage", f"cannot attach {name}: {why}")
            uploads.append(Upload(name, open(descriptor, "rb", buffering=0, closefd=False)))  # noqa: SIM115
        yield uploads
