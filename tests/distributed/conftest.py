"""Tests of what ranks found together run where the ranks did: with xdist's ``--dist loadgroup``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "distributed" in item.path.parts and ("found" in fixtures or "told" in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
