"""Position ids of a whole prompt with video and audio, in the layouts of video-SALMONN 2+.

The stream encoders compute the same ids chunk by chunk; here they follow from the token ids of a complete prompt, for
the model's own `forward` and `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from omnimem.backbones.layout import patch_position_ids
from omnimem.errors import OmniMemError


@dataclass(frozen=True)
class MediaTokens:
    """Placeholder token ids of media; `merge`² patches of the vision tower become one token."""

    video: int
    audio: int
    merge: int


def span_position_ids(
    ids: Tensor,
    grids: Tensor,
    ids_per_patch: Tensor,
    tokens: MediaTokens,
    position_layout: str = "train",
) -> Tensor:
    """Position ids of a prompt in the Qwen2.5-VL family (see `Qwen2_5VLStreamEncoder`).

    Parameters
    ----------
    ids : Tensor
        int64 ``[T]`` token ids of one prompt, without padding.
    grids : Tensor
        int64 ``[V, 3]``: patches of each video along time, height and width.
    ids_per_patch : Tensor
        ``[V]`` time ids per temporal patch.
    tokens : MediaTokens
        Placeholder tokens of media.
    position_layout : {"train", "release"}
        See `Qwen2_5VLStreamEncoder`.

    Returns
    -------
    Tensor
        int64 ``[3, T]``.

    Raises
    ------
    OmniMemError
        Video tokens and grids do not match.
    """
    videos = [_video_position_ids(grid, tokens, step) for grid, step in zip(grids, ids_per_patch, strict=True)]
    if position_layout == "release":
        return _release_ids(ids, videos, tokens)
    found, start = [], 0
    for media, span in _spans(ids, tokens):
        visual = span == tokens.video
        if not media or not visual.any():
            # Audio without video has text-like ids.
            found.append(_text(len(span), start))
            start += len(span)
            continue
        video = _take_video(videos, int(visual.sum()))
        span_positions = torch.zeros(3, len(span), dtype=torch.int64)
        span_positions[:, visual] = video
        audio = torch.arange(int((~visual).sum()))
        span_positions[:, ~visual] = torch.stack((audio, torch.zeros_like(audio), audio))
        found.append(span_positions + start)
        # Text after video and audio continues after the largest time id; another video after the largest of all axes.
        start += int((span_positions[0] if len(audio) and not videos else span_positions).max()) + 1
    _check_all_used(videos)
    return torch.cat(found, dim=1)


def group_position_ids(ids: Tensor, grids: Tensor, tokens: MediaTokens) -> Tensor:
    """Position ids ``[3, T]`` of a prompt ``[T]`` in the Qwen3-VL family (see `Qwen3VLStreamEncoder`)."""
    sides = [(t, h // tokens.merge, w // tokens.merge) for t, h, w in grids.tolist()]
    found, start = [], 0
    for is_video, run in groupby(ids.tolist(), lambda token: token == tokens.video):
        length = len(list(run))
        if not is_video:
            found.append(_text(length, start))
            start += length
            continue
        if not sides or length % (sides[0][1] * sides[0][2]) or length // (sides[0][1] * sides[0][2]) > sides[0][0]:
            raise OmniMemError(f"{length} video tokens in a row do not fit the grid of the video")
        left, height, width = sides.pop(0)
        patches = length // (height * width)
        positions = patch_position_ids(torch.arange(patches), height, width)
        found.append(positions + start)
        start += int(positions.max()) + 1
        if left > patches:
            sides.insert(0, (left - patches, height, width))
    _check_all_used(sides)
    return torch.cat(found, dim=1)


def _video_position_ids(grid: Tensor, tokens: MediaTokens, ids_per_patch: Tensor) -> Tensor:
    """Position ids of a video, relative to its start."""
    patches, height, width = grid.tolist()
    return patch_position_ids(torch.arange(patches), height // tokens.merge, width // tokens.merge, ids_per_patch)


def _spans(ids: Tensor, tokens: MediaTokens) -> Iterator[tuple[bool, Tensor]]:
    """Runs of media tokens and of other tokens: (is media, token ids)."""
    media = (ids == tokens.video) | (ids == tokens.audio)
    borders = (media.diff() != 0).nonzero()[:, 0] + 1
    for run in torch.tensor_split(torch.arange(len(ids)), borders.tolist()):
        yield bool(media[run[0]]), ids[run]


def _release_ids(ids: Tensor, videos: list[Tensor], tokens: MediaTokens) -> Tensor:
    """Release layout: from the first video token on, tokens get the ids of the grid in order.

    This includes audio tokens. The tokens before the video and after its last grid id are text.
    """
    found, start, assigned = [], 0, 0
    while videos:
        video = videos.pop(0)
        video_tokens = (ids[assigned:] == tokens.video).nonzero()
        if not len(video_tokens):
            raise OmniMemError("more video grids than videos in the prompt")
        before = int(video_tokens[0])
        found += [_text(before, start), video + start + before]
        start += before + int(video.max()) + 1
        assigned += before + video.shape[1]
    found.append(_text(len(ids) - assigned, start))
    return torch.cat(found, dim=1)


def _take_video(videos: list[Tensor], count: int) -> Tensor:
    """Take the ids of the next video, which must have `count` tokens."""
    if not videos or videos[0].shape[1] != count:
        raise OmniMemError(
            f"{count} video tokens, but the grid says {videos[0].shape[1] if videos else 'that there is no video'}"
        )
    return videos.pop(0)


def _check_all_used(videos: list) -> None:
    if videos:
        raise OmniMemError("more video grids than videos in the prompt")


def _text(length: int, start: int) -> Tensor:
    """Position ids ``[3, length]`` of text."""
    return (torch.arange(length) + start).expand(3, -1)
