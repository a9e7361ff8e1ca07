"""The real thing: each file works with the command line that a user types, from nothing but downloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from forge_run import ROWS, WHOLE, Forge, Row, fresh_forge


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop tests that are for some rows only (``@pytest.mark.variants``) where another one is run."""
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        wanted: Sequence[str] = next((marker.args for marker in item.iter_markers("variants")), ())
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        (dropped if wanted and row is not None and not {row.name, row.variant} & {*wanted} else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="module", params=[ROWS[name] for name in WHOLE], ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    """The row whose main job is run."""
    found: Row = request.param
    return found


@pytest.fixture(scope="module")
def forge(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """A machine on which nothing was built yet."""
    with fresh_forge(row, tmp_path_factory.mktemp("logs")) as made:
        yield made
