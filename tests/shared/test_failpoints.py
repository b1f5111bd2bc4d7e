"""Failpoints: what a spec means, what it refuses, and that the documented names are those in the code."""

import re
from pathlib import Path

import pytest

from isthmus.failpoints import WIRE_NAMES, FailpointError, Failpoints

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("router", "prefill_service", "decode_service", "kv_transfer", "isthmus")


def outcomes(points: Failpoints, name: str, hits: int) -> list[str | None]:
    """What each hit did: an action for the caller, 'raised', or None."""
    seen: list[str | None] = []
    for _ in range(hits):
        try:
            seen.append(points.hit(name))
        except FailpointError:
            seen.append("raised")
    return seen


def test_an_entry_acts_on_every_hit_on_one_or_on_each_nth():
    points = Failpoints.parse("a=raise@2; b=raise;c=raise@every(3)")
    assert outcomes(points, "a", 4) == [None, "raised", None, None]
    assert outcomes(points, "other", 2) == [None, None]
    assert outcomes(points, "b", 2) == ["raised", "raised"]
    assert outcomes(points, "c", 7) == [None, None, "raised", None, None, "raised", None]


def test_one_name_may_have_several_entries():
    points = Failpoints.parse("transfer.fill=drop@3;transfer.fill=corrupt@5;transfer.fill=duplicate@every(4)")
    assert outcomes(points, "transfer.fill", 8) == [None, None, "drop", "duplicate", "corrupt", None, None, "duplicate"]


def test_only_entries_for_frames_harm_the_wire():
    assert not Failpoints().harm_the_wire
    assert not Failpoints.parse("decode.step=kill").harm_the_wire
    assert all(Failpoints.parse(f"{name}=kill@2").harm_the_wire for name in WIRE_NAMES)


@pytest.mark.parametrize(
    "spec",
    [
        "a",
        "a=sleep",
        "a=sleep(x)",
        "a=raise(1)",
        "a=kill@0",
        "a=sleep(601)",
        "a=raise b=kill",
        "a=explode",
        "a=kill@every",
        "a=kill@every(0)",
        "a=kill@2+",
        "decode.step=drop",
        "transfer.fill=lose",
    ],
)
def test_a_bad_entry_is_named(spec: str):
    with pytest.raises(ValueError, match="failpoint"):
        Failpoints.parse(f"good=kill;{spec}")


def test_the_documented_names_are_those_in_the_code():
    """The second table of the section; `hit` takes literals, but for the frames of WIRE_NAMES."""
    sources = (path.read_text() for folder in SERVICES for path in (ROOT / folder).rglob("*.py"))
    hit = {name for source in sources for name in re.findall(r"failpoints\.hit\(\s*\"([a-z_.]+)\"", source)}
    section = (ROOT / "docs/development.md").read_text().partition("## Failpoints")[2].partition("\n| name | hit |")[2]
    documented = re.findall(r"^\| `([a-z_.]+)` \|", section, re.MULTILINE)
    assert sorted(documented) == sorted(hit | set(WIRE_NAMES))
