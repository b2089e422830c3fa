"""The report of `omnimem data validate`: totals, counts of each code, duplicates, and the result of every file."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from data_prep.validate.findings import CODES, Finding, highest_severity
from data_prep.validate.journal import printable
from data_prep.validate.rows import check_rows
from data_prep.validate.targets import Target, has_media_suffix


def build_report(name: str, target: Target, entries: dict[str, dict[str, Any]], fast: bool) -> dict[str, Any]:
    """Put the results together.

    Parameters
    ----------
    name : str
        The target as the user named it.
    target : Target
    entries : dict
        Result of every file by `printable` path.
    fast : bool
        Whether nothing was decoded.

    Returns
    -------
    dict
        JSON only.
    """
    listed, ignored = _listed_files(target, entries)
    severities = [highest_severity(entry["findings"]) for entry in listed]
    errors = severities.count("error")
    report: dict[str, Any] = {
        "target": printable(name),
        "fast": fast,
        "totals": {
            "files": len(listed),
            "with_errors": errors,
            "with_warnings": severities.count("warning"),
            "fine": len(listed) - errors - severities.count("warning"),
            "hours": round(sum(entry["seconds"] or 0 for entry in listed) / 3600, 4),
            "bytes": sum(entry["size"] for entry in listed if entry["size"] > 0),
            "what": "files",
            "errors": errors,
            "usable": len(listed) - errors,
        },
    }
    counts = Counter(code for entry in listed for code in {finding["code"] for finding in entry["findings"]})
    if target.manifest is not None:
        manifest = target.manifest
        report["rows"] = rows = check_rows(manifest.rows, entries)
        rows["count"] = len(manifest.rows) + len(manifest.problems)
        bad = [Finding("bad_row", printable(problem)).record() for problem in manifest.problems]
        rows["findings"] = [*({**one, "lines": [], "media": None} for one in bad), *rows["findings"]]
        counts.update(finding["code"] for finding in rows["findings"])
        unusable = sum(1 for finding in rows["findings"] if finding["severity"] == "error")
        report["totals"] |= {"what": "rows", "errors": unusable, "usable": rows["usable"]}
    report["codes"] = {code: counts[code] for code in CODES if counts[code]}
    report["duplicates"] = _same_content(listed)
    report["ignored"] = ignored
    report["files"] = listed
    return report


def _listed_files(
    target: Target, entries: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Results of the files with their names; and the ignored files, including those that turned out not to be media."""
    listed, ignored = [], list(target.ignored)
    for path, names in target.files.items():
        entry = {**entries[printable(path)], "names": names}
        reason = next((f["message"] for f in entry["findings"] if f["code"] == "cannot_open"), None)
        if target.manifest is None and reason is not None and not has_media_suffix(path):
            ignored.append({"name": names[0], "reason": reason})  # neither manifest nor suffix says that it is media
        else:
            listed.append(entry)
    return listed, ignored


def _same_content(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of names whose files have the same content."""
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in listed:
        groups[entry["digest"] or entry["path"]] += entry["names"]
    return [{"digest": digest, "names": names} for digest, names in groups.items() if len(names) > 1]
