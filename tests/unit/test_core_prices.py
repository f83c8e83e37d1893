"""What calls cost by the price list, and by the operator's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.prices import KINDS, load_prices
from hive_core.protocol.money import MICRO, about, parse_usd, usd
from hive_core.protocol.refusal import Refusal

OURS = load_prices()
MILLION = dict.fromkeys(KINDS, 0)
ENTRY = 'input = 1\noutput = 2\ncache_write_5m = 3\ncache_write_1h = 4\ncache_read = 0.05\nfamily = "own"\n'


def a_million(model: str | None, kind: str) -> tuple[int, bool]:
    """The cost of 10 x 100,000 tokens of a kind, and whether the model is known."""
    cost = OURS.cost(model, {kind: 100_000})
    return cost.micro_usd * 10, cost.of_known_model


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-sonnet-4-5-20250929", "claude-3-7-sonnet-latest"])
def test_a_model_is_known_with_its_date_and_without(model: str) -> None:
    assert a_million(model, "input") == (3 * MICRO, True)
    assert a_million(model, "output") == (15 * MICRO, True)
    assert a_million(model, "cache_read") == (300_000, True)
    assert a_million(model, "cache_write_5m") == (3_750_000, True)
    assert a_million(model, "cache_write_1h") == (6 * MICRO, True)


@pytest.mark.parametrize(
    ("model", "usd_of_output"),
    [
        ("claude-opus-9", 75),
        ("claude-opus-4-55", 75),
        ("claude-haiku-9-20300101", 5),
        ("claude-sonnet-next", 22.5),  # the dearest of its family is that of long requests
        ("claude-opus-9-fast", 150),
        ("somebody-else", 150),
        (None, 150),
    ],
)
def test_a_model_of_unknown_price_counts_at_the_dearest_of_its_family(model: str | None, usd_of_output: float) -> None:
    assert a_million(model, "output") == (usd_of_output * MICRO, False)


def test_a_request_with_more_input_than_the_limit_is_dearer_whatever_kind_of_input_it_is() -> None:
    few = {"input": 1, "cache_read": 199_999}
    assert OURS.cost("claude-sonnet-4-5", few).micro_usd == -(-(3 * 10 + 3 * 199_999) // 10)
    many = {"input": 1, "cache_read": 200_000}
    assert OURS.cost("claude-sonnet-4-5", many).micro_usd == 120_006
    assert OURS.cost("claude-sonnet-4-5", {"output": 200_001}).micro_usd == 15 * 200_001


def test_a_search_of_the_provider_costs_a_cent() -> None:
    assert OURS.cost("claude-sonnet-4-5", {}, searches=2).micro_usd == 20_000


@given(st.dictionaries(st.sampled_from(KINDS), st.integers(0, 2**40)), st.sampled_from([None, "claude-haiku-4-5", "x"]))
def test_costs_are_whole_never_below_nothing_and_more_tokens_never_cost_less(
    tokens: dict[str, int], model: str | None
) -> None:
    cost = OURS.cost(model, tokens).micro_usd
    assert isinstance(cost, int)
    assert cost >= 0
    more = {kind: count + 1 for kind, count in tokens.items()}
    assert OURS.cost(model, more).micro_usd >= cost


def test_what_the_operators_own_list_says_wins_and_the_rest_is_ours(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(f'[[prices]]\nmodels = ["claude-sonnet-4-5"]\n{ENTRY}')
    prices = load_prices(own)
    assert prices.cost("claude-sonnet-4-5", {"output": MICRO}).micro_usd == 2 * MICRO
    assert prices.cost("claude-sonnet-4-5", {"cache_read": MICRO}).micro_usd == 50_000
    assert prices.cost("claude-haiku-4-5", {"output": MICRO}).micro_usd == 5 * MICRO
    assert prices.source == str(own)
    assert "public price list" in OURS.source


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "is not TOML"),
        ("a = 1", "has no [[prices]]"),
        ("prices = [1]", "has no [[prices]]"),
        (f"[[prices]]\nmodels = []\n{ENTRY}", "the models of own are no list of names"),
        (f'[[prices]]\nmodels = ["m"]\n{ENTRY.replace("output = 2", "output = -2")}', "output of m must be"),
        (f'[[prices]]\nmodels = ["m"]\n{ENTRY.replace("output = 2", "output = nan")}', "output of m must be"),
        (f'[[prices]]\nmodels = ["m"]\n{ENTRY.replace("output = 2", "output = true")}', "output of m must be"),
        (f'[[prices]]\nmodels = ["m"]\n{ENTRY}long = {{}}', "has no above_tokens"),
    ],
)
def test_a_list_that_is_none_is_refused_by_name(tmp_path: Path, text: str, why: str) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(text)
    with pytest.raises(Refusal) as refused:
        load_prices(own)
    assert refused.value.message.startswith(f"cannot use {own} as prices: ")
    assert why in refused.value.message


def test_a_list_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"cannot use .*/prices\.toml as prices"):
        load_prices(tmp_path / "prices.toml")


@pytest.mark.parametrize(
    ("text", "micro"), [("5", 5_000_000), ("0.25", 250_000), ("0.000001", 1), ("1000000000", 10**15)]
)
def test_an_amount_is_read_as_it_is_written(text: str, micro: int) -> None:
    assert parse_usd(text, "the day's budget") == micro


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "0",
        "0.0",
        "-1",
        "+1",
        "1e3",
        "1,5",
        ".5",
        "5.",
        "0.0000001",
        "10000000000",
        "1000000000.1",
        "٥",
        " 5",
        5,
        None,
        "nan",
    ],
)
def test_what_is_no_amount_is_refused(raw: object) -> None:
    with pytest.raises(Refusal, match=r"cannot use .* as the day's budget: give an amount of USD"):
        parse_usd(raw, "the day's budget")


@given(st.integers(1, 10**15))
def test_what_is_shown_of_an_amount_is_all_of_it(micro: int) -> None:
    assert parse_usd(usd(micro).removesuffix(" USD").replace(",", ""), "it") == micro
    assert len(usd(micro).split(".")[1]) >= len("00 USD")


@pytest.mark.parametrize(
    ("micro", "shown"),
    [(0, "0.00"), (49, "0.00"), (50, "0.0001"), (12_345, "0.0123"), (999_999, "1.00"), (1_234_567, "1.23")],
)
def test_at_a_glance_an_amount_is_short(micro: int, shown: str) -> None:
    assert about(micro) == f"{shown} USD"
