"""What `omnimem data validate` prints: broken and odd files and rows, how often each thing was found, totals.

omnimem data validate quickstart --report report.json
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.validate.findings import CODES, SEVERITIES, worst

SHOWN = 100  # lines of a table; the report has all
WIDE = 160  # columns where there is no terminal

STYLES = {"error": "red", "warning": "yellow", "info": "dim"}

SOUND = {
    "heard": "heard",
    "silent": "a silent track",
    "missing": "on, but the file has none",
    "off": "switched off",
    "none": "off and none there",
}
"""Kinds of rows by their sound, in words."""


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what is wrong or odd, a line a file, then the totals."""
    _print_findings(console, "files", [(entry["names"][0], entry["findings"]) for entry in report["files"]])
    if rows := report.get("rows"):
        lines = [(f"line {one['lines'][0]} {one['media']}" if one["lines"] else "", [one]) for one in rows["findings"]]
        _print_findings(console, "rows", lines)
    _print_codes(console, report)
    for group in report["duplicates"][:SHOWN]:
        console.print(Text(f"{len(group['names'])} names, the same content: {_some(group['names'])}"))
    if len(report["duplicates"]) > SHOWN:
        console.print(f"… and {len(report['duplicates']) - SHOWN} more such groups, in the report")
    if ignored := report["ignored"]:
        console.print(Text(f"passed over, no media: {len(ignored)} ({_some([one['name'] for one in ignored])})"))
    totals = report["totals"]
    console.print(
        f"{totals['files']} files, {totals['hours']:.2f} h: {totals['with_errors']} cannot be used, "
        f"{totals['with_warnings']} odd, {totals['fine']} fine" + (" (not decoded: --fast)" if report["fast"] else "")
    )
    if rows:
        heard = ", ".join(f"{rows['sound'][kind]} {word}" for kind, word in SOUND.items() if rows["sound"][kind])
        console.print(
            f"{rows['count']} rows, {rows['questions']} questions: {rows['usable']} rows can be used; sound: {heard}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _print_findings(console: Console, title: str, lines: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """A table of those with an error or a warning, errors first."""
    ranked = [(worst(findings), name, findings) for name, findings in lines]
    shown = sorted((one for one in ranked if one[0] in ("error", "warning")), key=lambda one: SEVERITIES.index(one[0]))
    if not shown:
        return
    table = Table(title=f"{title} that are broken or odd", title_justify="left")
    table.add_column(title[:-1], overflow="fold")
    table.add_column("found", overflow="fold")
    for _, name, findings in shown[:SHOWN]:
        said = Text("\n").join(
            Text(f"{one['severity']}: {one['message']}", STYLES[one["severity"]])
            for one in sorted(findings, key=lambda one: SEVERITIES.index(one["severity"]))
        )
        table.add_row(Text(name), said)
    console.print(table)
    if len(shown) > SHOWN:
        console.print(f"… and {len(shown) - SHOWN} more {title}, in the report")


def _print_codes(console: Console, report: dict[str, Any]) -> None:
    if not report["codes"]:
        return
    table = Table(title="how often", title_justify="left")
    table.add_column("found")
    table.add_column("times", justify="right")
    table.add_column("such as", overflow="fold")
    for code, count in report["codes"].items():
        severity, meaning = CODES[code]
        table.add_row(Text(meaning, STYLES[severity]), str(count), Text(_example(report, code)))
    console.print(table)


def _example(report: dict[str, Any], code: str) -> str:
    for entry in report["files"]:
        if any(finding["code"] == code for finding in entry["findings"]):
            return entry["names"][0]
    found = next(one for one in report["rows"]["findings"] if one["code"] == code)
    return found["media"] or ""
