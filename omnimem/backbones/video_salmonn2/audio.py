"""Audio branch of video-SALMONN 2+ (both families): 30 s of log-mel features to 60 decoder inputs.

Whisper's encoder maps a segment of 30 s to 1,500 frames; a Q-Former with one query reduces every window of 25 frames
(0.5 s) to one vector, which is projected to the hidden size of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem.backbones.video_salmonn2.configuration import VideoSalmonn2AudioConfig

SEGMENT_SECONDS = 30
"""Input length of Whisper's encoder in seconds."""


class AudioConnector(nn.Module):
    """Q-Former and projection in one module, so that recipes can train and save it as one projector."""

    def __init__(self, config: VideoSalmonn2AudioConfig) -> None:
        super().__init__()
        qformer: Any = config.qformer_config
        self.q_tokens = nn.Parameter(torch.zeros(1, config.query_length, qformer.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(qformer)
        self.audio_proj = nn.Linear(qformer.hidden_size, config.output_dim)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows of encoder states ``[W, 25, d]`` to decoder inputs ``[W, queries, C]``."""
        query = self.q_tokens.expand(len(windows), -1, -1)
        states = self.qformer(query_embeds=query, encoder_hidden_states=windows).last_hidden_state
        return self.audio_proj(states)


class VideoSalmonn2AudioModel(PreTrainedModel):
    """Whisper encoder and connector."""

    config_class = VideoSalmonn2AudioConfig
    config: VideoSalmonn2AudioConfig
    main_input_name = "input_features"
    input_modalities = ["audio"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VideoSalmonn2AudioConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder._from_config(config)
        self.connector = AudioConnector(config)
        frames = config.max_source_positions
        self.window = round(frames * config.second_per_window / SEGMENT_SECONDS)
        self.stride = round(frames * config.second_stride / SEGMENT_SECONDS)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioConnector):
            module.q_tokens.normal_(std=module.qformer.config.initializer_range)

    def train(self, mode: bool = True) -> VideoSalmonn2AudioModel:
        """Keep evaluation mode: the backward pass recomputes a chunk, and dropout would change its audio tokens."""
        return super().train(False)

    @property
    def tokens_per_segment(self) -> int:
        """Decoder inputs per segment of 30 s: 60."""
        windows = (self.config.max_source_positions - self.window) // self.stride + 1
        return windows * self.config.query_length

    def forward(self, input_features: Tensor) -> Tensor:
        """Segments of log-mel features ``[S, bins, 3000]`` to ``[S, 60, C]``."""
        if not len(input_features):
            return input_features.new_empty(0, self.tokens_per_segment, self.config.output_dim, dtype=self.dtype)
        states = self.encoder(input_features.to(self.dtype)).last_hidden_state
        windows = states.unfold(1, self.window, self.stride).transpose(2, 3)
        segments, count = windows.shape[:2]
        return self.connector(windows.flatten(0, 1)).view(segments, count * self.config.query_length, -1)
