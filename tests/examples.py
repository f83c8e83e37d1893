"""How hypothesis tries its examples here: many where there is time, and none against a clock.

A machine that is slow and loaded makes an example take long, which says nothing of what it tries.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "hive",
    deadline=None,
    max_examples=400 if os.environ.get("HIVE_LONG") == "1" else 60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hive")
