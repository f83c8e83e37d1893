"""The login of the real Claude Code as far as it goes without an account: its link, and a code that is wrong."""

from __future__ import annotations

import trio

from hive_core.containers.login_program import open_login_program
from tests.needs import find_claude

PATIENCE_S = 60.0


async def test_the_programs_login_shows_its_link_and_takes_a_code() -> None:
    claude = find_claude()
    assert claude is not None
    typed = False
    with trio.fail_after(PATIENCE_S):
        async with open_login_program(claude) as login:
            while login.screen.error is None:
                assert await login.read(), "it ended before it could take a code"
                if login.screen.link and not typed:
                    typed = True
                    await login.type_code("no-code-of-anybody#state")
            assert login.screen.link is not None
            assert login.screen.link.startswith("https://claude.com/")
            assert "code_challenge=" in login.screen.link
            assert "scope=user%3Ainference" in login.screen.link, "a token that can do more than think"
            assert login.screen.token is None
