"""docs/spool.md says of the format on disk what the code makes: each field, file and column, none missing."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from waxell_workers.core import ledger, quarantine, segments, shipper
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import MAX_LINE, decode, encode
from waxell_workers.core.records import FORMAT_VERSION, STATES, LLMCall, Record, RunEnded, Step
from waxell_workers.core.shipper import Shipper

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "spool.md").read_text()
CORE = ROOT / "waxell_workers" / "core"
KINDS = {kind.__struct_config__.tag: kind for kind in get_args(Record)}
COMMON = ("id", "at", "proc")
ALWAYS = "always there"
TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Any: "any JSON",
    int | None: "whole number or null",
    float | None: "number or null",
    list[dict[str, Any]]: "list",
    dict[str, Any]: "object",
}


def section(heading: str) -> str:
    """Return what stands below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/spool.md has no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of a page's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def expected(fields: list[msgspec.structs.FieldInfo]) -> list[tuple[str, str, str]]:
    """Return name, type and default of fields, as the page writes them."""
    described = []
    for field in fields:
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        shown = ALWAYS if default is msgspec.NODEFAULT else f"`{json.dumps(default)}`"
        described.append((f"`{field.name}`", TYPES[field.type], shown))
    return described


def documented(heading: str) -> list[tuple[str, str, str]]:
    table = rows(section(heading))
    assert all(len(row) == 4 and row[3].strip(" |") for row in table), heading
    return [(name, kind, default) for name, kind, default, _ in table]


@pytest.mark.parametrize("tag", KINDS)
def test_each_kind_of_record_has_its_fields_with_type_and_default(tag):
    """The tables are the structs of `core.records`: same fields, same order, same types, same defaults."""
    fields = [field for field in msgspec.structs.fields(KINDS[tag]) if field.name not in COMMON]
    assert documented(f"`{tag}`") == expected(fields)


def test_what_every_record_has_is_said_once():
    """`id`, `at` and `proc`, with one meaning for all kinds."""
    fields = [field for field in msgspec.structs.fields(Step) if field.name in COMMON]
    assert documented("every record") == expected(fields)


def test_the_page_knows_no_other_kind():
    """A kind that was taken away, or renamed, does not stay on the page."""
    assert set(re.findall(r"^### `(\w+)`$", TEXT, re.MULTILINE)) == set(KINDS)


def test_every_state_in_which_a_run_ends_is_named():
    """The page's list is the code's."""
    (row,) = [row for row in rows(section("`run_ended`")) if row[0] == "`state`"]
    assert tuple(re.findall(r"`(\w+)`", row[3])) == STATES
    (field,) = [field for field in msgspec.structs.fields(RunEnded) if field.name == "state"]
    assert f'"{field.default}"' in row[2]


def test_the_first_line_and_its_seal_are_where_the_page_says():
    """Whoever reads the seal by its offset reads the right byte."""
    first = segments.FIRST_LINE.decode()
    assert f"```\n{first}```" in section("Segments")
    assert f"of {len(first)} bytes" in section("Segments")
    assert f"**one byte, at offset {segments.SEAL_AT}**" in section("Segments")
    assert f'"version":{FORMAT_VERSION},' in first


def test_the_sizes_are_the_codes():
    """Segment, line, quarantine: in the units of the page."""
    assert f"has {shipper.SEGMENT_BYTES >> 20} MiB" in section("Segments")
    assert f"at most {MAX_LINE >> 10} KiB" in section("Records")
    assert f"up to {quarantine.FILE_BYTES >> 20} MiB each" in section("Directories")
    assert f"the last {ledger._REMEMBERED:,} ids" in section("The ledger")


def test_the_ledgers_tables_and_columns_are_on_the_page():
    """Each table that the shipper makes, with each column in its order, and none besides."""
    db = sqlite3.connect(":memory:")
    db.executescript(ledger._SCHEMA)
    made = {
        name: [column for _, column, *_ in db.execute(f"PRAGMA table_info({name})")]
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    }
    [[version]] = db.execute("PRAGMA user_version")
    db.close()
    on_page = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows(section("The ledger"))}
    assert on_page == made
    assert f"`PRAGMA user_version` is {version}" in section("The ledger")


def test_every_file_that_the_code_names_is_on_the_page():
    """A file of the destination's directory that is added to the code is missed here."""
    sources = "".join(source.read_text() for source in CORE.glob("*.py"))
    named = set(re.findall(r"directory\}/([a-z][\w.]+)\"", sources)) | {"ship.sock"}
    assert {"procs", "ship.lock", "shipper.db", "shipper.log", "quarantine.ndjson"} <= named
    listed = set(re.findall(r"`([\w.-]+)`", " ".join(row[0] for row in rows(section("Directories")))))
    assert named - listed == set()
    assert segments.segment_path("", 8).strip("/") in listed


def test_the_quarantine_has_the_page_s_shape(tmp_path):
    """A line that is really written has the fields of the example, and the example's record can be read."""
    call = LLMCall(id="c", at=1.0, model="m")
    Shipper(Settings(), str(tmp_path), stay=False)._quarantine(call, "no")
    written = json.loads((tmp_path / "quarantine.ndjson").read_text())
    (example,) = re.findall(r"```json\n(.*?)\n```", section("Quarantine"))
    shown = json.loads(example)
    assert list(shown) == list(written)
    assert {type(value) for value in shown.values()} == {type(value) for value in written.values()}
    assert decode(json.dumps(shown["record"]).encode()).id == shown["record"]["id"]


def test_the_example_is_a_segment():
    """Byte for byte what the code would write: first line, empty lines between, defaults left out."""
    (example,) = re.findall(r"```ndjson\n(.*?)```", section("An example"), re.DOTALL)
    first, _, rest = example.partition("\n")
    assert f"{first}\n".encode() == segments.FIRST_LINE
    lines = [line for line in rest.splitlines() if line]
    assert rest.encode() == b"".join(encode(decode(line.encode())) for line in lines)
    assert {json.loads(line)["kind"] for line in lines} >= {"run_started", "llm_call", "run_ended"}
