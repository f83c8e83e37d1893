from __future__ import annotations

import re
import string
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.protocol import words
from hive_core.protocol.ends import how_ended
from hive_core.protocol.refusal import EXIT_CODES, Refusal
from hive_core.protocol.visible import counted, hides, named, named_apart

LETTERS, TAIL = string.ascii_lowercase, string.ascii_lowercase + string.digits
good_names = st.lists(st.text(TAIL, min_size=1, max_size=6), min_size=1, max_size=4).map("-".join)


def test_a_number_of_things_is_told_as_one_or_as_many() -> None:
    assert [counted(number, "turn") for number in (0, 1, 2)] == ["0 turns", "1 turn", "2 turns"]
    assert counted(1, "message waits", "messages wait") == "1 message waits"
    assert counted(1_000, "message waits", "messages wait") == "1,000 messages wait"


def refusal_of(call: object, *arguments: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.code == "usage"
    return caught.value


def passes(name: object) -> bool:
    try:
        return words.parse_agent_name(name) == name
    except Refusal:
        return False


@settings(deadline=None)
@given(good_names)
def test_a_name_of_letters_digits_and_single_dashes_passes_unless_it_is_long_reserved_or_begins_with_a_digit(
    name: str,
) -> None:
    assert passes(name) == (len(name) <= 30 and name[0] in LETTERS and name not in words.RESERVED)


@settings(deadline=None)
@given(st.text(max_size=40) | st.text(TAIL + "-/.\n\0 A", max_size=12))
def test_any_text_that_passes_as_a_name_is_made_of_what_the_rule_says(text: str) -> None:
    if passes(text):
        assert set(text) <= set(TAIL + "-")
        assert text[0] in LETTERS
        assert "--" not in text
        assert not text.endswith("-")
        assert 1 <= len(text) <= 30


@pytest.mark.parametrize(
    "raw",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "iris\n",
        "\niris",
        "iris\0",
        "iris ",
        "Iris",
        "-rf",
        "a--b",
        "a-",
        "1st",
        "a" * 31,
        "a" * 300,
        "iris٣",  # a digit of another script
        "irıs",
        "ſ",
        "iris\ud800",
        None,
        7,
        True,
        ["iris"],
        {"name": "iris"},
        b"iris",
    ],
)
def test_what_is_no_name_is_refused_with_the_rule(raw: object) -> None:
    said = refusal_of(words.parse_agent_name, raw).message
    assert "1 to 30 characters of a-z, 0-9 and single dashes" in said
    assert said.isascii() or "…" in said
    assert len(said) < 250


def test_a_name_of_thirty_characters_passes() -> None:
    assert passes("a" * 30)


@pytest.mark.parametrize("raw", ["operator", "system", "forge", "all", "manager", "hive"])
def test_a_reserved_name_is_refused_as_reserved(raw: str) -> None:
    assert "reserved" in refusal_of(words.parse_agent_name, raw).message


def test_the_operator_is_a_recipient_and_the_other_reserved_words_are_not() -> None:
    assert words.parse_recipient("operator") == "operator"
    assert words.parse_recipient("hm1nd") == "hm1nd"
    for raw in ("system", "all", "manager", "operator\n"):
        refusal_of(words.parse_recipient, raw)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_hostile_input_is_shown_short_and_printable(text: str) -> None:
    shown = words.shown(text)
    assert len(shown) < 80
    assert re.fullmatch(r"[\x20-\x7e…]*", shown)


@pytest.mark.parametrize(
    "raw",
    [
        "a" * 39,
        "a" * 41,
        "A" * 40,
        "g" * 40,
        "a" * 40 + "\n",
        " " + "a" * 39,
        "٣" * 40,
        "HEAD",
        "main",
        "deadbee",
        "-" * 40,
        None,
        40,
    ],
)
def test_only_forty_lower_case_hex_digits_are_a_commit(raw: object) -> None:
    assert "40 hex digits" in refusal_of(words.parse_commit_sha, raw).message


@settings(deadline=None)
@given(st.binary(min_size=20, max_size=20))
def test_a_whole_commit_id_passes(raw: bytes) -> None:
    assert words.parse_commit_sha(raw.hex()) == raw.hex()


DIGEST = "sc9jz69hl8nhs9v35syra7j72g2cvgsw"


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "",
        f"/nix/store/{DIGEST}",
        f"/nix/store/{DIGEST}-",
        f"/nix/store/{DIGEST}-.drv",
        f"/nix/store/{DIGEST}-a/bin/sh",
        f"/nix/store/{DIGEST}-a\n",
        f"/nix/store/{DIGEST}-a b",
        f"/nix/store/../store/{DIGEST}-a",
        f"/nix/store/{DIGEST.replace('s', 'e')}-a",
        f"/tmp/nix/store/{DIGEST}-a",
        f"/nix/store/{DIGEST}-{'a' * 212}",
    ],
)
def test_what_is_not_the_whole_path_of_a_thing_in_the_store_is_refused(raw: object) -> None:
    assert "/nix/store/DIGEST-NAME" in refusal_of(words.parse_store_path, raw).message


def test_a_path_in_the_store_is_itself() -> None:
    path = f"/nix/store/{DIGEST}-nixos-system-h-iris-25.11.20260101.0123abc"
    assert words.parse_store_path(path) == path


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_the_limit_of_a_body_counts_bytes_not_characters(character: str) -> None:
    size = len(character.encode())
    most = words.BODY_LIMIT_BYTES // size
    fits = character * most + "a" * (words.BODY_LIMIT_BYTES - most * size)
    assert len(fits.encode()) == words.BODY_LIMIT_BYTES
    assert words.parse_body(fits) == fits
    said = refusal_of(words.parse_body, fits + "a").message
    assert f"{words.BODY_LIMIT_BYTES + 1:,} bytes" in said
    assert f"{words.BODY_LIMIT_BYTES:,}" in said


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ("", "empty"),
        (" \n\t\u3000", "empty"),
        ("a\0b", "NUL"),
        ("half \ud83d", "surrogate"),
        ("\udc00", "surrogate"),
        (None, "string"),
        (7, "string"),
        (["hi"], "string"),
        (b"hi", "string"),
    ],
)
def test_what_is_no_body_is_refused_with_its_cause(raw: object, cause: str) -> None:
    assert cause in refusal_of(words.parse_body, raw).message


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip))
def test_any_other_text_passes_as_a_body_unchanged(text: str) -> None:
    assert words.parse_body(text) == text


@pytest.mark.parametrize("raw", [0, -1, 2**63, 10**400, True, False, 1.0, float("nan"), "1", None, [1]])
def test_only_a_positive_whole_number_that_sqlite_can_hold_is_an_id(raw: object) -> None:
    assert "a message" in refusal_of(words.parse_id, raw, "a message").message


@pytest.mark.parametrize("raw", [1, 2**63 - 1])
def test_the_smallest_and_the_largest_id_pass(raw: int) -> None:
    assert words.parse_id(raw, "a message") == raw


def test_a_refusal_survives_the_wire() -> None:
    refusal = Refusal("not_found", "cannot find iris")
    again = Refusal.from_wire(refusal.to_wire())
    assert (again.code, again.message, str(again)) == ("not_found", "cannot find iris", "cannot find iris")


@pytest.mark.parametrize("wire", [None, 7, "no", [], {}, {"code": 5}])
def test_a_malformed_refusal_becomes_one_with_a_sentence(wire: object) -> None:
    refusal = Refusal.from_wire(wire)
    assert refusal.message
    assert isinstance(refusal.code, str)


def test_the_exit_codes_are_those_the_manual_promises() -> None:
    assert EXIT_CODES == {"usage": 2, "not_found": 3, "not_running": 3, "refused": 4, "conflict": 4}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "was ended from outside"),
        (0, "ended with code 0"),
        (1, "ended with code 1"),
        (-9, "was killed by signal 9 (SIGKILL)"),
        (137, "was killed by signal 9 (SIGKILL)"),
        (143, "was killed by signal 15 (SIGTERM)"),
        (255, "ended with code 255"),
        (128, "ended with code 128"),
        (-(2**40), f"ended with code {-(2**40)}"),
    ],
)
def test_how_a_process_ended_is_said_in_words(code: int | None, said: str) -> None:
    assert how_ended(code) == said


@pytest.mark.parametrize(
    "text",
    [
        "é, e\u0301 and Vi\u0065\u0323\u0302t, naïve Žižek, Ω, й, 한국어, 漢字",
        "日本\u3000語",
        "हिन्दी, ภาษาไทยที่นี่, עִבְרִית, العَرَبِيَّة",
        "👩\u200d💻 ❤️\u200d🔥 ✈️ 1️⃣ #️⃣ 👋🏽 🇩🇪 ℹ️ ‼️ ⚠️ 🫠",
        "a → b − c … “quoted” – and\ta tab\nand a line",
    ],
)
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert named(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("de\u0336l\u0336", "de⟨U+0336⟩l⟨U+0336⟩"),  # struck through
        ("a\xa0b\u2003c\u202fd\u3000e", "a⟨U+00A0⟩b⟨U+2003⟩c⟨U+202F⟩d⟨U+3000⟩e"),
        ("z\u0301\u0302\u0303\u0304", "z\u0301\u0302⟨U+0303⟩⟨U+0304⟩"),
        ("5\u0301, \u0301x", "5⟨U+0301⟩, ⟨U+0301⟩x"),
        ("a\u20dd b\u20e3", "a⟨U+20DD⟩ b⟨U+20E3⟩"),
        ("a\ufe0f 1\ufe0f b\u200dc", "a⟨U+FE0F⟩ 1⟨U+FE0F⟩ b⟨U+200D⟩c"),
        ("a\ufe0f\u200d💻", "a⟨U+FE0F⟩⟨U+200D⟩💻"),
    ],
)
def test_a_character_that_hides_or_makes_another_look_otherwise_is_named(text: str, shown: str) -> None:
    assert named(text) == shown
    assert named(shown) == shown


def test_every_control_format_and_space_character_is_named_wherever_it_stands() -> None:
    kinds = ("Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp", "Me")
    strange = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in kinds]
    assert [sign for sign in strange if not hides(f"a{sign}b")] == ["\t", "\n", " "]


def test_every_mark_that_is_drawn_over_what_stands_before_it_is_named_wherever_it_stands() -> None:
    over = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code)) == 1]
    assert [sign for sign in over if not hides(f"a{sign}b")] == []


@given(st.text(st.sampled_from("ae5 \u0301\u0323\u0336\ufe0f\u20e3\u200d\u3000\u202e日💻❤⟨")))
def test_what_was_named_has_nothing_hidden_any_more(text: str) -> None:
    assert not hides(named(text))


def test_words_from_right_to_left_are_kept_apart_in_a_terminal() -> None:
    assert named_apart("model: אב גד → הו\u202e") == "model: \u2068אב גד\u2069 → \u2068הו\u2069⟨U+202E⟩"
