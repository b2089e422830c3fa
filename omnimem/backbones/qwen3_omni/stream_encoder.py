"""Stream encoder of Qwen3-Omni: video and audio tokens merged by time id.

The layout is that of the model's processor, ``<|vision_start|><|audio_start|>…<|audio_end|><|vision_end|>``; a temporal
patch precedes the first audio token whose time id is not smaller. The position ids equal `get_rope_index` on the whole
clip, float32, 13 per second: video (start + 13·t, start + h, start + w), audio start + i on all three axes. Unlike in
Qwen2.5-Omni, every start and end token has its own position id.

The vision and audio towers are exact by chunks: they attend within one temporal patch and within a window of 8 s.
The mel features before them use the maximum so far by default (`mel_floor`); see `MelStream`.
Chunks end at multiples of both, where the time ids are whole numbers, so the tokens of a chunk never have to be
inserted before tokens of an earlier chunk.
"""

from __future__ import annotations

from copy import copy
from math import ceil
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_position_ids
from omnimem.backbones.mel import MelStream
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.vision import encode_frames
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL

TOKENS_PER_MEL_BLOCK = 13
"""Audio tokens per full block of 100 mel frames: three convolutions halve it, rounding up."""


class Qwen3OmniStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    mel_floor : float or "running"
        See `MelStream`.
    """

    backbone: TransformersBackbone
    id_dtype = torch.float32

    def __init__(self, backbone: TransformersBackbone, *, mel_floor: float | str = "running", **options: Any) -> None:
        super().__init__(backbone, **options)
        config = backbone.config
        self.seconds_per_patch = backbone.temporal_patch / self.fps
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.mel_block_frames = 2 * config.audio_config.n_window
        self.mel = MelStream(
            backbone.processor.feature_extractor,
            attention_window_frames(config.audio_config),
            mel_floor,
            reflect_end=True,
        )
        self.prompt_prefix_ids = backbone.text_ids(backbone.prompt_prefix)
        self.ids_per_second: int = config.position_id_per_seconds
        self.time_scale = self.choose_time_scale(self.ids_per_second, self.prompt_prefix_ids.shape[1])
        self.patches_seen = 0
        self.audio_seen = 0
        self.start = 0

    def prefix(self) -> ChunkInputs:
        """System prompt, start of the user turn, and the start tokens of the media."""
        names = (["vision_bos"] if self.has_video else []) + (["audio_bos"] if self.has_audio else [])
        inputs = self.join([self.text(self.prompt_prefix_ids), self.text(self._ids(names))])
        self.start = int(self.next_position_id)
        return inputs

    def closing(self) -> ChunkInputs:
        """The end tokens of the media."""
        names = (["audio_eos"] if self.has_audio else []) + (["vision_eos"] if self.has_video else [])
        position_ids = _consecutive(self.next_position_id, len(names) + 1)
        return self.join([self.text(self._ids(names), position_ids[:-1])], position_ids[-1])

    def fork(self) -> Qwen3OmniStreamEncoder:
        """Copy of this encoder with its own state, which includes the running maximum of the mel features."""
        other = copy(self)
        other.mel = copy(self.mel)
        return other

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode the next chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz audio of ``[t0, t1)`` seconds.

        Returns
        -------
        ChunkInputs
            Batch size 1: video and audio tokens in the order of their time ids, video first where they are equal.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        first = self.audio_seen
        features = self._audio(chunk) if self.has_audio and chunk.audio is not None else None
        spans, emitted = [], first
        for due, patch in self._video(chunk) if self.has_video and len(chunk.frames) else []:
            if features is not None:
                until = min(max(ceil(due), emitted), self.audio_seen)
                spans.append(self._audio_span(features, first, emitted, until))
                emitted = until
            spans.append(patch)
        if features is not None:
            spans.append(self._audio_span(features, first, emitted, self.audio_seen))
        spans = [span for span in spans if len(span)]
        if spans:
            # As in get_rope_index: text continues after the largest id of the *last* span.
            self.next_position_id = _consecutive(spans[-1].position_ids.max().item(), 2)[1]
        return self.join(spans)

    def _video(self, chunk: Chunk) -> list[tuple[float, TokenSpan]]:
        """Video tokens of the chunk: (index of the audio token that follows, span) for each temporal patch."""
        patches = encode_frames(self.backbone, chunk.frames, self.limits)
        numbers = torch.arange(self.patches_seen, self.patches_seen + len(patches))
        self.patches_seen += len(patches)
        seconds = numbers * torch.tensor(self.seconds_per_patch)
        # Position ids: same dtype (float32) and order of operations as in the model. Order of video and audio tokens:
        # float64, as in the processor.
        time = seconds * self.ids_per_second * self.time_scale
        grid = patch_position_ids(torch.zeros(1, dtype=torch.int64), patches.height, patches.width).to(self.id_dtype)
        spans = []
        for i, number in enumerate(numbers.tolist()):
            ids = grid.clone()
            ids[0] += time[i]
            deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
            span = TokenSpan(patches.embeds[i], ids + self.start, VISUAL, seconds[i].expand(ids.shape[1]), deepstack)
            spans.append((number * self.seconds_per_patch * self.ids_per_second, span))
        return spans

    def _audio(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[N, C]`` of the audio of a chunk; advances `audio_seen`."""
        mel = self.mel.frames(chunk)
        frames = mel.shape[1]
        count = audio_tokens(frames, self.mel_block_frames)
        tower = self.backbone.model.model.audio_tower
        if count == 0:
            return torch.empty(0, tower.config.output_dim, device=self.backbone.device)
        lengths = [frames]
        if frames < self.mel_block_frames and self.audio_seen > 0:
            # The tower pads its blocks to the longest one, and its convolutions see the padding. In the whole clip a
            # last, shorter block is padded to a full one; add a full block here to get the same padding.
            mel = torch.cat((mel.new_zeros(len(mel), self.mel_block_frames), mel), dim=1)
            lengths = [self.mel_block_frames, frames]
        features = tower(
            mel.to(self.backbone.device, tower.dtype), feature_lens=torch.tensor(lengths, device=self.backbone.device)
        ).last_hidden_state[-count:]
        self.audio_seen += count
        return features

    def _audio_span(self, features: Tensor, first: int, start: int, stop: int) -> TokenSpan:
        """Audio tokens `start` to `stop` of the stream; `features` begin at token `first`."""
        numbers = torch.arange(start, stop)
        ids = (self.start + numbers * self.time_scale).to(self.id_dtype)
        return TokenSpan(
            features[start - first : stop - first], ids.expand(3, -1), AUDIO, numbers / TOKENS_PER_MEL_BLOCK
        )

    def _ids(self, names: list[str]) -> Tensor:
        """Token ids ``[1, N]`` of special tokens by their names in the tokenizer."""
        tokenizer = self.backbone.tokenizer
        return torch.tensor([[self.backbone.token_id(getattr(tokenizer, f"{name}_token")) for name in names]])


def attention_window_frames(audio_config: Any) -> int:
    """Mel frames per attention window of the audio tower (800 in the published model), a multiple of its block."""
    block = 2 * audio_config.n_window
    return audio_config.n_window_infer // block * block


def audio_tokens(frames: int, block: int) -> int:
    """Audio tokens for `frames` mel frames in blocks of `block`: three convolutions of stride 2, rounding up."""
    last = frames % block
    for _ in range(3):
        last = (last + 1) // 2
    return frames // block * TOKENS_PER_MEL_BLOCK + last


def _consecutive(start: float, count: int) -> list[float]:
    """`count` ids from the fractional id `start` on, rounded to float32 as in the model."""
    return (torch.arange(count) + torch.tensor(start, dtype=torch.float32)).tolist()
