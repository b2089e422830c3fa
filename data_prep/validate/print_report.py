"""Print the report of `omnimem data validate`: unusable and unusual files and rows, counts of findings, totals.

omnimem data validate quickstart --report report.json
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.validate.findings import CODES, SEVERITIES, highest_severity

MAX_LINES = 100  # of a printed table; the report lists everything
WIDTH = 160  # columns if the output is not a terminal

STYLES = {"error": "red", "warning": "yellow", "info": "dim"}

AUDIO_USE = {
    "used": "used",
    "silent": "silent",
    "missing": "missing",
    "ignored": "ignored",
    "none": "off, no audio track",
}
"""Printed name of each kind in ``rows.audio``."""


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print one line for each unusable or unusual file and row, then counts and totals."""
    _print_findings(console, "files", [(entry["names"][0], entry["findings"]) for entry in report["files"]])
    if rows := report.get("rows"):
        lines = [(f"line {one['lines'][0]} {one['media']}" if one["lines"] else "", [one]) for one in rows["findings"]]
        _print_findings(console, "rows", lines)
    _print_codes(console, report)
    for group in report["duplicates"][:MAX_LINES]:
        console.print(Text(f"{len(group['names'])} names, same content: {_some(group['names'])}"))
    if len(report["duplicates"]) > MAX_LINES:
        console.print(f"… and {len(report['duplicates']) - MAX_LINES} more groups, see the report")
    if ignored := report["ignored"]:
        console.print(Text(f"ignored, not media: {len(ignored)} ({_some([one['name'] for one in ignored])})"))
    totals = report["totals"]
    console.print(
        f"{totals['files']} files, {totals['hours']:.2f} h: {totals['with_errors']} unusable, "
        f"{totals['with_warnings']} unusual, {totals['fine']} fine"
        + (" (not decoded: --fast)" if report["fast"] else "")
    )
    if rows:
        audio = ", ".join(f"{rows['audio'][kind]} {word}" for kind, word in AUDIO_USE.items() if rows["audio"][kind])
        console.print(
            f"{rows['count']} rows, {rows['questions']} questions: {rows['usable']} rows usable; audio: {audio}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _print_findings(console: Console, title: str, lines: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """A table of files or rows with an error or a warning, errors first."""
    ranked = [(highest_severity(findings), name, findings) for name, findings in lines]
    severe = sorted((one for one in ranked if one[0] in ("error", "warning")), key=lambda one: SEVERITIES.index(one[0]))
    if not severe:
        return
    table = Table(title=f"unusable or unusual {title}", title_justify="left")
    table.add_column(title[:-1], overflow="fold")
    table.add_column("findings", overflow="fold")
    for _, name, findings in severe[:MAX_LINES]:
        messages = Text("\n").join(
            Text(f"{one['severity']}: {one['message']}", STYLES[one["severity"]])
            for one in sorted(findings, key=lambda one: SEVERITIES.index(one["severity"]))
        )
        table.add_row(Text(name), messages)
    console.print(table)
    if len(severe) > MAX_LINES:
        console.print(f"… and {len(severe) - MAX_LINES} more {title}, see the report")


def _print_codes(console: Console, report: dict[str, Any]) -> None:
    if not report["codes"]:
        return
    table = Table(title="counts", title_justify="left")
    table.add_column("finding")
    table.add_column("count", justify="right")
    table.add_column("example", overflow="fold")
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
