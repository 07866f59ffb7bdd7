"""Gates as JUnit XML, the form that CI systems show: one test suite an artifact, one test case a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgecomp import files


def to_xml(entries: Sequence[Mapping[str, Any]]) -> str:
    """The parity entries as JUnit XML (the schema of Jenkins and GitHub's readers)."""
    cases = [(e, g) for e in entries for g in e["gates"]]
    root = ElementTree.Element("testsuites", tests=str(len(cases)), failures=str(_failures(cases)))
    for entry in entries:
        own = [(entry, g) for g in entry["gates"]]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"parity {Path(entry['path']).name}",
            tests=str(len(own)),
            failures=str(_failures(own)),
        )
        for _, gate in own:
            case = ElementTree.SubElement(suite, "testcase", classname=entry["target"], name=gate["expr"])
            if not gate["passed"]:
                failure = ElementTree.SubElement(case, "failure", message=str(gate["reason"]))
                failure.text = f"value: {gate['value']}"
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def write(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the XML atomically. Raises OutputError."""
    with files.atomic(path) as temporary:
        temporary.write_text(to_xml(entries), encoding="utf-8")


def _failures(cases: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> int:
    return sum(not g["passed"] for _, g in cases)
