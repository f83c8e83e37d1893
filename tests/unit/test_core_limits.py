from __future__ import annotations

import pytest

from hive_core.config import Config
from hive_core.limits import Limits
from hive_core.services.turns import LINES_PER_AGENT, LINES_PER_TURN
from tests.defaults_page import PAGE, in_words, page


def test_the_page_of_defaults_says_what_the_code_says() -> None:
    assert PAGE.read_text("utf-8") == page(), "write it anew: python -m tests.defaults_page"


def test_the_page_on_keeping_says_how_many_lines_are_kept() -> None:
    said = f"{LINES_PER_TURN:,} lines a turn, {LINES_PER_AGENT:,} lines and"
    assert said in PAGE.with_name("keeping.md").read_text("utf-8")


def test_the_defaults_are_those_that_were_promised() -> None:
    promised = {"tries": 5, "hops": 24, "pair_rate_per_hour": 60, "inbox_depth": 1000, "question_ttl_s": 6 * 3600}
    promised |= {"lease_silence_s": 60, "kept_s": 30 * 24 * 3600}
    assert promised.items() <= Limits().model_dump().items()


def test_every_limit_is_a_key_of_the_configuration_and_tells_what_it_is() -> None:
    assert Limits.model_fields.keys() <= Config.model_fields.keys()
    assert all(field.description for field in Limits.model_fields.values())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tries", 5, "5"),
        ("inbox_depth", 1000, "1,000"),
        ("body_quota_bytes", 256 * 2**20, "256 MiB"),
        ("BODY_LIMIT_BYTES", 64 * 1024, "64 KiB"),
        ("KEY_LIMIT_BYTES", 200, "200 bytes"),
        ("backoff_s", 2.0, "2 s"),
        ("wait_s", 180.0, "180 s"),
        ("rest_s", 3600.0, "1 h"),
        ("question_ttl_s", 6 * 3600.0, "6 h"),
        ("kept_s", 30 * 86_400.0, "30 days"),
    ],
)
def test_a_value_is_said_with_the_unit_that_its_name_tells(name: str, value: float, said: str) -> None:
    assert in_words(name, value) == said
