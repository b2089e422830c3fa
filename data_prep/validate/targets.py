"""The files that `omnimem data validate` checks: those of a manifest, or those below a folder.

Files without a media suffix are opened as well, unless their suffix is in NOT_MEDIA.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.decoded_clips.folder import is_prepared
from data_prep.manifest import Manifest, read_manifest
from data_prep.validate.file import AUDIO_SUFFIXES, VIDEO_SUFFIXES, suffixes
from data_prep.validate.journal import printable
from omnimem.errors import OmniMemError

NOT_MEDIA = suffixes(
    "adf ass bin bmp cfg csv db gz heic htm html idf idx ini jpeg jpg json jsonl lock log md ndjson npy npz"
    " parquet pdf pickle pkl png py rst safetensors sh srt sub tar tif tiff toml tsv txt vtt webp xb xml yaml yml zip"
)
"""Files that are never opened: FFmpeg would read some as a video of one frame and render others as text."""


@dataclass(frozen=True)
class Target:
    """What to check.

    Attributes
    ----------
    files : dict
        The names under which each file is reported, by absolute path.
    ignored : list of dict
        ``name`` and ``reason`` of every file that is not checked.
    manifest : Manifest or None
        None for a folder or a single file.
    """

    files: dict[Path, list[str]]
    ignored: list[dict[str, str]] = field(default_factory=list)
    manifest: Manifest | None = None


def find_target(target: str, root: str | os.PathLike[str] | None) -> Target:
    """Find the files to check.

    Raises
    ------
    OmniMemError
        No such target, a prepared folder, no readable row, no media, or a root without a manifest.
    """
    path = Path(target)
    if is_prepared(path):
        raise OmniMemError(f"{target} is a prepared folder, whose clips were decoded to their end; name its manifest")
    if target == "quickstart" or is_manifest(path):
        manifest = _read_quietly(target, root)
        return Target(_files_of_manifest(manifest), manifest=manifest)
    if root is not None:
        raise OmniMemError(f"--root is for manifests, and {target} is not a manifest; leave --root out")
    if path.is_dir():
        files, ignored = _walk(path)
        if not files:
            raise OmniMemError(f"{target}: no media in this folder ({len(ignored)} other files)")
        return Target(files, ignored)
    return Target({Path(os.path.realpath(path)): [printable(path.name)]})


def is_manifest(path: Path) -> bool:
    """Whether `path` is a manifest, judged by its suffix, or by the Parquet files in it."""
    if path.is_dir():
        return any(path.glob("*.parquet"))
    return not has_media_suffix(path)


def has_media_suffix(path: Path) -> bool:
    """Whether the suffix is that of a video or audio file."""
    return path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES


def _read_quietly(target: str, root: str | os.PathLike[str] | None) -> Manifest:
    """Read a manifest without logging its bad rows, which are part of the report."""
    log = logging.getLogger("omnimem.data")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return read_manifest(target, root, on_bad_row="skip")
    finally:
        log.setLevel(level)


def _files_of_manifest(manifest: Manifest) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for row in manifest.rows:
        names[row.media] = [printable(row.name)]
        if row.audio_path is not None and row.audio_path not in names:
            names[row.audio_path] = [printable(os.path.relpath(row.audio_path, row.media.parent))]
    return names


def _walk(folder: Path) -> tuple[dict[Path, list[str]], list[dict[str, str]]]:
    """Files below a folder, sorted by name; links to files are followed, links to folders are not."""
    files: dict[Path, list[str]] = defaultdict(list)
    ignored = []

    def unreadable(error: OSError) -> None:
        ignored.append({"name": printable(error.filename), "reason": f"cannot be read: {error.strerror}"})

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            shown = printable(path.relative_to(folder))
            if name.startswith("."):
                ignored.append({"name": shown, "reason": "a hidden file"})
            elif not path.is_file():  # opening a pipe would block
                ignored.append({"name": shown, "reason": "not a file, or a broken link"})
            elif path.suffix.lower() in NOT_MEDIA:
                ignored.append({"name": shown, "reason": f"{path.suffix} is not a media format"})
            else:
                files[Path(os.path.realpath(path))].append(shown)
    return dict(files), ignored
