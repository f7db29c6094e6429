"""What `docs/capture.md` says to be heard is what the code knows of and tests try."""

from __future__ import annotations

import re

import pytest

from tests.capture.shapes import PACKAGES, TABLE
from tests.docs.captured import BEGIN, END, PAGE, ROOT, captured, tables, tomllib, written
from waxell_workers.capture.sdks import SDKS

SHAPES = tomllib.loads(TABLE.read_text("utf-8"))
PINNED = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (TABLE.parent / "oldest.txt").read_text(), re.MULTILINE))


def test_the_page_is_up_to_date() -> None:
    """The tables are those of the code and the data as they are now."""
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == written(page), "run `make docs`"


def test_every_sdk_is_described() -> None:
    """Whoever adds an SDK says in docs/captured.toml what of it is heard, and what is not."""
    assert captured().keys() == {sdk.name for sdk in SDKS}
    assert all(said["heard"] for said in captured().values())
    for sdk in SDKS:
        assert tables().count(f"| `{sdk.name}` |") == 2


def test_what_is_said_to_be_heard_has_shapes_that_try_it() -> None:
    """An SDK with shapes of calls is described endpoint by endpoint, no more and no fewer than are tried."""
    tried: dict[str, set[str]] = {}
    for section, api in SHAPES.items():
        _, distribution = PACKAGES[api["sdk"]]
        tried.setdefault(distribution, set()).add(section)
    assert tried
    for distribution, sections in tried.items():
        (sdk,) = (sdk for sdk in SDKS if distribution in sdk.distributions)
        assert captured()[sdk.name]["heard"].keys() == sections


@pytest.mark.parametrize("sdk", SDKS, ids=lambda sdk: sdk.name)
def test_versions_are_named_only_where_they_were_tried(sdk) -> None:
    """Where there are tests there is a version; the oldest is that of the tests' environment."""
    said = captured()[sdk.name]
    assert bool(said["tests"]) == bool(said["newest"])
    assert said["newest"] or not said["oldest"]
    if said["tests"]:
        assert (ROOT / said["tests"]).exists()
    if sdk.distributions[0] in PINNED:
        assert said["oldest"] == PINNED[sdk.distributions[0]]
