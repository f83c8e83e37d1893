"""The real Claude Code looks at an image that came with a message: its Read tool shows it to the model."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

from tests.claude.test_story import step
from tests.daemons import KEY, open_daemon
from tests.needs import find_claude
from tests.scripted_model import Answer, Request, ScriptedModel, blocks_of, say, tool

# One red point.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


def images(request: Request) -> list[str]:
    """The types of the images in the results of the last message."""
    results = [block for block in blocks_of(request.messages[-1].get("content")) if block.get("type") == "tool_result"]
    shown = [block for result in results for block in blocks_of(result.get("content"))]
    return [block["source"]["media_type"] for block in shown if block.get("type") == "image"]


def answer(request: Request) -> Answer:
    path = re.search(r'file: "([^"]+)" \(image/png', request.last_user_text if step(request) == 0 else "")
    match step(request):
        case 0 if path:
            return say(tool("Read", file_path=path[1]))
        case 1:
            return say(tool("mcp__hive__send", to="operator", body=f"I saw {images(request)}"))
        case _:
            return "Done."


def test_an_image_that_the_operator_sent_is_seen_by_the_model(tmp_path: Path) -> None:
    (tmp_path / "shot.png").write_bytes(PNG)
    with ScriptedModel(answer) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        with open_daemon(*flags, ANTHROPIC_API_KEY=KEY) as daemon:
            client = daemon.start()
            descriptor = os.open(tmp_path / "shot.png", os.O_RDONLY)
            client.call("send", [descriptor], to="hm1nd", files=[{"name": "shot.png"}])
            os.close(descriptor)
            assert daemon.wait_message(client, "I saw")["body"] == "I saw ['image/png']"
