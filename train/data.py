"""The rows of a run: read from a manifest or a prepared folder, checked, and opened as streams of chunks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from data_prep.clip_info import OpenedRow, open_rows
from data_prep.decoded_clips.folder import PreparedRow, is_prepared, read_prepared, read_settings
from data_prep.decoded_clips.format import frame_stride
from data_prep.decoded_clips.shard_reader import ShardReader
from data_prep.manifest import Manifest, Row, read_manifest
from omnimem.backbones import Backbone, StreamEncoder
from omnimem.errors import OmniMemError
from omnimem.media import Chunk, MediaInfo
from omnimem.recipe import DataConfig
from omnimem.stream_settings import StreamSettings

log = logging.getLogger("omnimem.train")


def load_rows(config: DataConfig, supports_audio: bool = True) -> Manifest:
    """Read the manifest and open every clip once, so that unusable clips are found before training starts.

    Clips are opened in parallel, and only those that changed since an earlier start (`data_prep.clip_info`). Clips of a
    prepared folder are not opened: `omnimem data prepare` has decoded them. For a model without audio support a clip
    needs a video track.

    Raises
    ------
    OmniMemError
        As `read_manifest` and `read_prepared`; a clip that cannot be opened under ``on_bad_row=error``; no usable
        row; a folder that was prepared with other settings.
    """
    manifest, opened = _read_rows(config, supports_audio)
    rows, problems = [], list(manifest.problems)
    for row, outcome in zip(manifest.rows, opened, strict=True):
        try:
            if isinstance(outcome, OmniMemError):
                raise outcome
            _check_tracks(row, clip_info(outcome), config, supports_audio)
            _warn_late_questions(row, clip_info(outcome), config.path)
            rows.append(outcome)
        except OmniMemError as error:
            if config.on_bad_row == "error":
                raise OmniMemError(f"{config.path}:{row.line}: {error} (data.on_bad_row=skip skips it)") from error
            problems.append(f"{config.path}:{row.line}: {error}")
            log.warning("row skipped: %s", problems[-1])
    if not rows:
        raise OmniMemError(f"{config.path}: no usable row: {problems[0]}")
    return Manifest(rows, problems)


def _read_rows(config: DataConfig, supports_audio: bool) -> tuple[Manifest, Sequence[Row | OmniMemError]]:
    """The manifest, and each of its rows opened or with the reason why it cannot be."""
    if not is_prepared(config.path):
        manifest = read_manifest(config.path, config.root, config.on_bad_row)
        return manifest, open_rows(manifest.rows, config.path)
    settings, _ = read_settings(config.path)
    wanted = {key: getattr(config, key) for key in ("fps", "short_side", "max_seconds")}
    frame_stride(settings, f"data.path={config.path}", audio=config.audio and supports_audio, **wanted)
    manifest = read_prepared(config.path, config.on_bad_row)
    return manifest, manifest.rows


def _check_tracks(row: Row, info: MediaInfo, config: DataConfig, supports_audio: bool) -> None:
    """Refuse a clip without a track that the model reads."""
    if info.has_video or (info.has_audio and row.audio and config.audio and supports_audio):
        return
    reason = "no video and no audio that is read" if supports_audio else "no video, and the model does not take audio"
    raise OmniMemError(f"{row.name}: {reason}")


def _warn_late_questions(row: Row, info: MediaInfo, path: str) -> None:
    for question in row.questions:
        if question.time is not None and info.duration is not None and question.time > info.duration:
            log.warning(
                "%s:%d: question at %g s, but %s ends at %.1f s: it is asked at the end",
                path, row.line, question.time, row.name, info.duration,
            )  # fmt: skip


def clip_info(row: Row) -> MediaInfo:
    """Header information about the clip of a row from `load_rows`."""
    assert isinstance(row, OpenedRow | PreparedRow)
    return row.info


def open_row(row: Row, settings: StreamSettings, backbone: Backbone) -> tuple[Iterable[Chunk], StreamEncoder]:
    """Open a row's clip, or its prepared frames and audio; return its chunks and an encoder at their start.

    Raises
    ------
    OmniMemError
        As `StreamSettings.open` and `ShardReader`.
    """
    settings = replace(settings, audio=settings.audio and row.audio)
    if not isinstance(row, PreparedRow):
        return settings.open(row.media, backbone, row.audio_path)
    settings.check(backbone)
    reader = ShardReader(
        row.media,
        name=row.name,
        fps=settings.fps,
        chunk_seconds=settings.chunk_seconds,
        audio=settings.audio and backbone.supports_audio,
        short_side=settings.short_side,
        max_seconds=settings.max_seconds,
    )
    return reader, settings.stream_encoder(reader.info, backbone)
