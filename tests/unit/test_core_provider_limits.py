from __future__ import annotations

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.provider_limits import FAR_MS, Window, reset_of, windows_of

NOW_S = 1_800_000_000
NOW_MS = NOW_S * 1000
U = "anthropic-ratelimit-unified"


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after": "Fri, 15 Jan 2027 08:01:00 GMT"}, 60),
        ({f"{U}-reset": str(NOW_S + 600)}, 600),
        ({f"{U}-reset": "2027-01-15T08:10:00Z"}, 600),
        # The longer of the two: the account lets nobody in before either is over.
        ({"retry-after": "7", f"{U}-reset": str(NOW_S + 600)}, 600),
        # The window that is used up, not the one that is named first.
        ({f"{U}-5h-reset": str(NOW_S + 60), f"{U}-7d-reset": str(NOW_S + 600), f"{U}-7d-status": "rejected"}, 600),
        ({f"{U}-5h-reset": str(NOW_S + 60), f"{U}-7d-reset": str(NOW_S + 600), f"{U}-5h-status": "rejected"}, 60),
        ({f"{U}-7d-reset": str(NOW_S + 600), f"{U}-representative-claim": "seven_day", f"{U}-reset": "1"}, 600),
        # A key's: only a bucket that is empty says how long to wait.
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:00:20Z",
                "anthropic-ratelimit-tokens-remaining": "5",
                "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:50Z",
            },
            20,
        ),
        # What cannot be is not believed.
        ({"retry-after": "-3"}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e300"}, None),
        ({"retry-after": "soon"}, None),
        ({f"{U}-reset": str(NOW_S - 1)}, None),
        ({f"{U}-reset": str(NOW_S + FAR_MS // 1000 + 1)}, None),
    ],
)
def test_the_instant_until_which_to_wait_is_the_one_that_the_answer_tells(
    headers: dict[str, str], after_s: float | None
) -> None:
    expected = None if after_s is None else NOW_MS + int(after_s * 1000)
    assert reset_of(httpx2.Headers(headers), NOW_MS) == expected


def test_the_windows_are_what_was_told_and_what_was_not_is_unknown() -> None:
    headers = {f"{U}-5h-utilization": "0.42", f"{U}-5h-reset": str(NOW_S + 60), f"{U}-7d-reset": str(NOW_S + 60)}
    assert windows_of(httpx2.Headers(headers), NOW_MS) == {"5h": Window(0.42, NOW_MS + 60_000, NOW_MS)}
    assert windows_of(httpx2.Headers({f"{U}-7d-utilization": "1.02"}), NOW_MS) == {"7d": Window(1.02, None, NOW_MS)}
    for nonsense in ("", "much", "-1", "nan", "inf", "1e9"):
        assert windows_of(httpx2.Headers({f"{U}-5h-utilization": nonsense}), NOW_MS) == {}


@given(
    st.dictionaries(st.sampled_from(["retry-after", f"{U}-reset", f"{U}-5h-utilization", f"{U}-5h-reset"]), st.text())
)
def test_no_header_of_the_providers_breaks_the_reading(headers: dict[str, str]) -> None:
    at = reset_of(headers, NOW_MS)
    assert at is None or NOW_MS < at <= NOW_MS + FAR_MS
    assert all(0 <= window.used <= 100 for window in windows_of(headers, NOW_MS).values())
