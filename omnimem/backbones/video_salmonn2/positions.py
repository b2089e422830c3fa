"""Rotary ids of a whole sequence with picture and sound, in the layouts of video-SALMONN 2+.

The stream encoders count the same ids chunk by chunk; here they are read off the token ids of a complete prompt, for
the model's own `forward` and `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from omnimem.backbones.layout import patch_ids
from omnimem.errors import OmniMemError


@dataclass(frozen=True)
class MediaTokens:
    """Token ids that stand for media, and the patches that become one position."""

    video: int
    audio: int
    merge: int


def span_ids(
    ids: Tensor,
    grids: Tensor,
    ids_per_patch: Tensor,
    tokens: MediaTokens,
    position_layout: str = "train",
) -> Tensor:
    """Ids of a prompt in the Qwen2.5-VL family (see `Qwen2_5VLStreamEncoder`).

    Parameters
    ----------
    ids : Tensor
        int64 ``[T]`` token ids of one prompt, without padding.
    grids : Tensor
        int64 ``[V, 3]``: temporal patches and patches by side of each video.
    ids_per_patch : Tensor
        ``[V]`` time ids from a temporal patch to the next.
    tokens : MediaTokens
        Which ids are media.
    position_layout : {"train", "release"}
        See `Qwen2_5VLStreamEncoder`.

    Returns
    -------
    Tensor
        int64 ``[3, T]``.

    Raises
    ------
    OmniMemError
        Video tokens that the grids do not explain.
    """
    videos = [_grid(grid, tokens, step) for grid, step in zip(grids, ids_per_patch, strict=True)]
    if position_layout == "release":
        return _released(ids, videos, tokens)
    found, start = [], 0
    for media, span in _spans(ids, tokens):
        pictures = span == tokens.video
        if not media or not pictures.any():
            # Sound alone is counted like text.
            found.append(_text(len(span), start))
            start += len(span)
            continue
        video = _next(videos, int(pictures.sum()))
        span_positions = torch.zeros(3, len(span), dtype=torch.int64)
        span_positions[:, pictures] = video
        sound = torch.arange(int((~pictures).sum()))
        span_positions[:, ~pictures] = torch.stack((sound, torch.zeros_like(sound), sound))
        found.append(span_positions + start)
        # Behind picture and sound by the time ids alone, but where another video follows.
        start += int((span_positions[0] if len(sound) and not videos else span_positions).max()) + 1
    _check_all_used(videos)
    return torch.cat(found, dim=1)


def group_ids(ids: Tensor, grids: Tensor, tokens: MediaTokens) -> Tensor:
    """Ids of a prompt in the Qwen3-VL family (see `Qwen3VLStreamEncoder`): ``[3, T]`` from ``[T]`` and ``[V, 3]``."""
    sides = [(t, h // tokens.merge, w // tokens.merge) for t, h, w in grids.tolist()]
    found, start = [], 0
    for key, run in groupby(ids.tolist(), lambda token: token == tokens.video):
        length = len(list(run))
        if not key:
            found.append(_text(length, start))
            start += length
            continue
        if not sides or length % (sides[0][1] * sides[0][2]) or length // (sides[0][1] * sides[0][2]) > sides[0][0]:
            raise OmniMemError(f"{length} video tokens in a row do not fit the grid of the video")
        left, height, width = sides.pop(0)
        patches = length // (height * width)
        positions = patch_ids(torch.arange(patches), height, width)
        found.append(positions + start)
        start += int(positions.max()) + 1
        if left > patches:
            sides.insert(0, (left - patches, height, width))
    _check_all_used(sides)
    return torch.cat(found, dim=1)


def _grid(grid: Tensor, tokens: MediaTokens, ids_per_patch: Tensor) -> Tensor:
    patches, height, width = grid.tolist()
    return patch_ids(torch.arange(patches), height // tokens.merge, width // tokens.merge, ids_per_patch)


def _spans(ids: Tensor, tokens: MediaTokens) -> Iterator[tuple[bool, Tensor]]:
    """Runs of media tokens and of others, in turn."""
    media = (ids == tokens.video) | (ids == tokens.audio)
    borders = (media.diff() != 0).nonzero()[:, 0] + 1
    for run in torch.tensor_split(torch.arange(len(ids)), borders.tolist()):
        yield bool(media[run[0]]), ids[run]


def _released(ids: Tensor, videos: list[Tensor], tokens: MediaTokens) -> Tensor:
    """As many positions as a video has patches, counted from its first, whatever stands there; the rest is text."""
    found, start, done = [], 0, 0
    while videos:
        video = videos.pop(0)
        left = (ids[done:] == tokens.video).nonzero()
        if not len(left):
            raise OmniMemError("more video grids than videos in the prompt")
        before = int(left[0])
        found += [_text(before, start), video + start + before]
        start += before + int(video.max()) + 1
        done += before + video.shape[1]
    found.append(_text(len(ids) - done, start))
    return torch.cat(found, dim=1)


def _next(videos: list[Tensor], count: int) -> Tensor:
    if not videos or videos[0].shape[1] != count:
        raise OmniMemError(
            f"{count} video tokens, but the grid says {videos[0].shape[1] if videos else 'that there is no video'}"
        )
    return videos.pop(0)


def _check_all_used(videos: list) -> None:
    if videos:
        raise OmniMemError("more video grids than videos in the prompt")


def _text(length: int, start: int) -> Tensor:
    return (torch.arange(length) + start).expand(3, -1)
