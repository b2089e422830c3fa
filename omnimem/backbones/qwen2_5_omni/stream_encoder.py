"""Stream encoder of Qwen2.5-Omni: video and audio interleaved in blocks of 2 s.

The layout is that of the model's processor,
``<|vision_bos|><|audio_bos|>[2 s video][2 s audio]…<|audio_eos|><|vision_eos|>``. The position ids are TMRoPE
(arXiv 2503.20215) and equal `get_rope_index` on the whole clip: video (start + ⌊25·t⌋, start + h,
start + w), audio start + i on all three axes; the two start tokens share one id, and so do the two end tokens.

The vision and audio towers are exact by chunks: they attend within one temporal patch and within 2 s. The mel
features before them use the maximum so far by default (`mel_floor`), not that of the whole clip; see `MelStream`.
"""

from __future__ import annotations

from copy import copy
from math import floor
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

AUDIO_TOKENS_PER_SECOND = 25
"""Audio tokens per second: the audio tower halves 100 mel frames twice."""


class Qwen2_5OmniStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    mel_floor : float or "running"
        See `MelStream`.
    """

    backbone: TransformersBackbone

    def __init__(self, backbone: TransformersBackbone, *, mel_floor: float | str = "running", **options: Any) -> None:
        super().__init__(backbone, **options)
        config = backbone.config
        self.block_seconds = float(config.seconds_per_chunk)
        self.seconds_per_patch = torch.tensor(backbone.temporal_patch / self.fps)
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.mel = MelStream(backbone.processor.feature_extractor, 2 * config.audio_config.n_window, mel_floor)
        self.prompt_prefix_ids = backbone.text_ids(backbone.prompt_prefix)
        per_second = config.position_id_per_seconds
        self.time_scale = self.choose_time_scale(per_second, self.prompt_prefix_ids.shape[1])
        self.ids_per_second = per_second * self.time_scale
        self.patches_seen = 0
        self.audio_seen = 0
        self.start = 0

    def prefix(self) -> ChunkInputs:
        """System prompt, start of the user turn, and the start tokens of the media, which share one position id."""
        names = (["vision_bos"] if self.has_video else []) + (["audio_bos"] if self.has_audio else [])
        prompt = self.text(self.prompt_prefix_ids)
        start_tokens = self.text(self._ids(names), [self.next_position_id] * len(names))
        self.start = self.next_position_id = int(self.next_position_id) + 1
        return self.join([prompt, start_tokens])

    def closing(self) -> ChunkInputs:
        """The end tokens of the media, which share one position id."""
        names = (["audio_eos"] if self.has_audio else []) + (["vision_eos"] if self.has_video else [])
        end_tokens = self.text(self._ids(names), [self.next_position_id] * len(names))
        return self.join([end_tokens], self.next_position_id + 1)

    def fork(self) -> Qwen2_5OmniStreamEncoder:
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
            Batch size 1: for each 2 s the video tokens, then the audio tokens.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        video = self._video(chunk) if self.has_video and len(chunk.frames) else []
        audio = self._audio(chunk) if self.has_audio and chunk.audio is not None else []
        blocks = sorted({block for block, _ in (*video, *audio)})
        ordered = [span for block in blocks for spans in (video, audio) for index, span in spans if index == block]
        if ordered:
            # As in get_rope_index: text continues after the largest id of the *last* span.
            self.next_position_id = int(ordered[-1].position_ids.max()) + 1
        return self.join(ordered)

    def _video(self, chunk: Chunk) -> list[tuple[int, TokenSpan]]:
        """Video tokens of the chunk: (index of the 2 s block, span) for each temporal patch."""
        patches = encode_frames(self.backbone, chunk.frames, self.limits)
        numbers = torch.arange(self.patches_seen, self.patches_seen + len(patches))
        self.patches_seen += len(patches)
        seconds = numbers * self.seconds_per_patch
        # Same dtype (float32) and order of operations as in the model.
        time = (seconds * self.ids_per_second).long()
        spans = []
        for i, embeds in enumerate(patches.embeds):
            ids = patch_position_ids(time[i : i + 1], patches.height, patches.width) + self.start
            block = floor(seconds[i].item() / self.block_seconds + 1e-6)
            spans.append((block, TokenSpan(embeds, ids, VISUAL, seconds[i].expand(len(embeds)).float())))
        return spans

    def _audio(self, chunk: Chunk) -> list[tuple[int, TokenSpan]]:
        """Audio tokens of the chunk: (index of the 2 s block, span) for each 2 s."""
        mel = self.mel.frames(chunk)
        tokens = _audio_tokens(mel.shape[1])
        if tokens == 0:
            return []
        tower = self.backbone.model.model.audio_tower
        lengths = torch.tensor([mel.shape[1]], device=self.backbone.device)
        features = tower(
            mel.to(self.backbone.device, tower.dtype), feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1
        ).last_hidden_state
        numbers = torch.arange(self.audio_seen, self.audio_seen + tokens)
        self.audio_seen += tokens
        ids = (self.start + (numbers * self.time_scale).long()).expand(3, -1)
        seconds = numbers / AUDIO_TOKENS_PER_SECOND
        size = round(self.block_seconds * AUDIO_TOKENS_PER_SECOND)
        return [
            (
                int(numbers[i]) // size,
                TokenSpan(features[i : i + size], ids[:, i : i + size], AUDIO, seconds[i : i + size]),
            )
            for i in range(0, tokens, size)
        ]

    def _ids(self, names: list[str]) -> Tensor:
        """Token ids ``[1, N]`` of special tokens by their names in the tokenizer."""
        tokenizer = self.backbone.tokenizer
        return torch.tensor([[self.backbone.token_id(getattr(tokenizer, f"{name}_token")) for name in names]])


def _audio_tokens(frames: int) -> int:
    """Audio tokens for a number of mel frames: a convolution and a pooling of stride 2."""
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1) if frames else 0
