"""What an agent says of itself: its pronouns, its icon, a line about itself, and what it is at now. Its own words.

Each change is an event, of which an agent makes so many an hour and no more.
"""

from __future__ import annotations

import unicodedata

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides
from hive_core.protocol.words import AgentName, parse_text, shown
from hive_core.services.rates import count_sent, sent_lately
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

PRONOUNS_LIMIT, ABOUT_LIMIT, STATUS_LIMIT = 40, 200, 200  # characters
_CHANGES = "changes of its profile"  # in the place of a recipient; no name has a space
_ICON_LIMIT = 8  # code points
_TONES = range(0x1F3FB, 0x1F400)
_FLAGS = range(0x1F1E6, 0x1F200)


def parse_icon(raw: object) -> str:
    """One sign that can be seen: a letter or an emoji with its marks. Raises Refusal("usage").

    Signs that are joined to one by an invisible joiner are not taken: what hides nowhere else does not hide here.
    """
    cannot = f"cannot use {shown(raw)} as an icon"
    if not isinstance(raw, str) or not raw or len(raw) > _ICON_LIMIT or hides(raw) or not raw.isprintable():
        raise Refusal("usage", f"{cannot}: give one sign that can be seen, such as 🦉")
    first, rest = raw[0], raw[1:]
    if ord(first) in _FLAGS:
        fits = len(rest) == 1 and ord(rest) in _FLAGS
    else:
        fits = unicodedata.category(first)[0] in "LNSP" and all(_belongs(one) for one in rest)
    if not fits:
        raise Refusal("usage", f"{cannot}: give one sign, such as 🦉")
    return raw


def _belongs(sign: str) -> bool:
    """Whether it is part of the sign before it."""
    return unicodedata.category(sign) in ("Mn", "Me") or ord(sign) in _TONES


async def set_profile(
    store: Store,
    limits: Limits,
    name: AgentName,
    given_pronouns: object,
    given_icon: object = None,
    given_about: object = None,
) -> dict[str, str]:
    """What an agent says of itself from now on; what is left out stays. What there is then.

    Raises Refusal: "usage", and "refused" for one that changes it too often.
    """
    given = {"pronouns": _line(given_pronouns, "pronouns", PRONOUNS_LIMIT)}
    if given_icon is not None:
        given["icon"] = parse_icon(given_icon)
    if given_about is not None:
        given["about"] = _line(given_about, "about", ABOUT_LIMIT)

    def write(tx: Transaction) -> dict[str, str]:
        row = tx.execute("SELECT pronouns, icon, about FROM agents WHERE name = ?", (name,)).fetchone()
        before = {key: row[key] for key in ("pronouns", "icon", "about") if row[key]}
        if (after := before | given) != before:
            _count_change(tx, name, "profile", limits)
            sql = "UPDATE agents SET pronouns = ?, icon = ?, about = ? WHERE name = ?"
            tx.execute(sql, (after.get("pronouns"), after.get("icon"), after.get("about"), name))
            tx.emit("agent_profile", name, name, profile=after)
        return after

    return await store.write(write)


async def set_status(store: Store, limits: Limits, name: AgentName, given_text: object) -> dict[str, str]:
    """What an agent says that it is about, until it says otherwise; an empty text takes that back.

    Raises Refusal: "usage", and "refused" for one that changes it too often.
    """
    status = None
    if not isinstance(given_text, str) or given_text.strip():
        status = parse_text(given_text, "status", 4 * STATUS_LIMIT).strip()
    if status is not None and len(status) > STATUS_LIMIT:
        size = f"it has {len(status)} characters and the limit is {STATUS_LIMIT}"
        raise Refusal("usage", f"cannot take the status: {size}")

    def write(tx: Transaction) -> None:
        sql = "UPDATE agents SET status = ?, status_at_ms = ? WHERE name = ? AND status IS NOT ?"
        if tx.execute(sql, (status, tx.now_ms, name, status)).rowcount:
            _count_change(tx, name, "status", limits)
            tx.emit("agent_status", name, name, status=status)

    await store.write(write)
    return {"status": status or ""}


def _count_change(tx: Transaction, name: AgentName, what: str, limits: Limits) -> None:
    if (changes := sent_lately(tx, name, _CHANGES)) >= limits.profile_changes_per_hour:
        why = f"{name} changed what it says of itself {changes:,} times within an hour, which is the limit"
        raise Refusal("refused", f"cannot change the {what}: {why} (profile_changes_per_hour); wait")
    count_sent(tx, name, _CHANGES)


def _line(raw: object, what: str, limit: int) -> str:
    text = parse_text(raw, what, 4 * limit).strip()
    if len(text) > limit or hides(text) or not text.isprintable():
        raise Refusal("usage", f"cannot take the {what}: give one line of at most {limit} visible characters")
    return text
