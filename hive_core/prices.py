"""What calls cost: the price list beside this file, and the operator's own before it.

USD for a million tokens is micro-USD for one, so a list is kept as whole micro-USD for a million tokens, and a call's
cost is rounded once, upwards.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hive_core.protocol.money import MICRO
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

KINDS = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")
SEARCH_MICRO_USD = 10_000  # a search of the web that the provider made itself
_BEHIND = re.compile(r"(-20\d{6}|@20\d{6}|-latest)?")
_PRICE_MOST_USD = 1_000_000


@dataclass(frozen=True, slots=True)
class Rates:
    """Micro-USD for a million tokens of each of KINDS."""

    micro_usd: tuple[int, ...]
    above_tokens: int | None = None  # of input: from there on `long` holds
    long: Rates | None = None

    def for_input(self, tokens: int) -> Rates:
        return self.long if self.long is not None and tokens > (self.above_tokens or 0) else self


class _Listed(NamedTuple):
    family: str
    models: tuple[str, ...]
    rates: Rates


class Cost(NamedTuple):
    micro_usd: int
    of_known_model: bool


class Prices:
    """A price list. `source` and `date` say where ours is from and how old it is."""

    def __init__(self, listed: Iterable[_Listed], source: str, date: str) -> None:
        self._listed = list(listed)
        self.source = source
        self.date = date

    def cost(self, model: str | None, tokens: Mapping[str, int], searches: int = 0) -> Cost:
        """The cost of so many tokens by KINDS. A model that is in no list counts at the dearest of its family, or of
        all when its family is in none either.
        """
        rates = self._find(model)
        taken = sum(count for kind, count in tokens.items() if kind != "output")
        found = (rates or self._dearest(model)).for_input(taken).micro_usd
        millionths = sum(tokens.get(kind, 0) * rate for kind, rate in zip(KINDS, found, strict=True))
        return Cost(-(-millionths // MICRO) + searches * SEARCH_MICRO_USD, rates is not None)

    def _find(self, model: str | None) -> Rates | None:
        for _, models, rates in self._listed:
            for name in models:
                if model is not None and model.startswith(name) and _BEHIND.fullmatch(model, len(name)):
                    return rates
        return None

    def _dearest(self, model: str | None) -> Rates:
        words = re.split(r"[^a-z]+", (model or "").lower())
        family = [one.rates for one in self._listed if one.family in words]
        every = family or [one.rates for one in self._listed]
        every = every + [rates.long for rates in every if rates.long is not None]
        return Rates(tuple(max(of_kind) for of_kind in zip(*(rates.micro_usd for rates in every), strict=True)))


def load_prices(own: Path | None = None) -> Prices:
    """Our list; what the operator's own says wins. Raises Refusal("usage") naming that file and the entry."""
    ours = tomllib.loads(resources.files("hive_core").joinpath("prices.toml").read_text("utf-8"), parse_float=Decimal)
    if own is None:
        return Prices(_listed(ours), ours["source"], str(ours["date"]))
    try:
        theirs = tomllib.loads(own.read_text("utf-8"), parse_float=Decimal)
        return Prices([*_listed(theirs), *_listed(ours)], str(theirs.get("source") or own), str(theirs.get("date", "")))
    except OSError as exc:
        why = explain(exc, "prices")
    except UnicodeDecodeError:
        why = "it is not UTF-8; save it as UTF-8, or set prices to another"
    except tomllib.TOMLDecodeError as exc:
        why = f"it is not TOML: {exc}"
    except ValueError as exc:
        why = f"{exc}; see hive_core/prices.toml for the form"
    raise Refusal("usage", f"cannot use {own} as prices: {why}")


def _listed(data: Mapping[str, Any]) -> list[_Listed]:
    """Raises ValueError."""
    entries = data.get("prices")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it has no [[prices]]")
    return [_one(entry) for entry in entries]


def _one(entry: dict[str, Any]) -> _Listed:
    family, models = entry.get("family"), entry.get("models")
    if not isinstance(family, str) or not re.fullmatch("[a-z]{1,40}", family):
        raise ValueError(f"its family {shown(family)} is no word of a-z")
    if not isinstance(models, list) or not models or not all(isinstance(name, str) and name for name in models):
        raise ValueError(f"the models of {family} are no list of names")
    long = entry.get("long")
    if long is None:
        return _Listed(family, tuple(models), _rates(entry, models[0]))
    above = long.get("above_tokens") if isinstance(long, dict) else None
    if isinstance(above, bool) or not isinstance(above, int) or above < 0:
        raise ValueError(f"`long` of {models[0]} has no above_tokens")
    return _Listed(family, tuple(models), Rates(_rates(entry, models[0]).micro_usd, above, _rates(long, models[0])))


def _rates(entry: dict[str, Any], model: str) -> Rates:
    found = []
    for kind in KINDS:
        given: Any = entry.get(kind)
        price = Decimal(given) if type(given) in (int, Decimal) else Decimal("NaN")  # true is an int, too
        if not (price.is_finite() and 0 <= price <= _PRICE_MOST_USD):
            raise ValueError(f"{kind} of {model} must be a number of USD for a million tokens")
        found.append(int((price * MICRO).to_integral_value()))
    return Rates(tuple(found))
