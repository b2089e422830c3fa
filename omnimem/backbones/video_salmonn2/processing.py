"""Processor of video-SALMONN 2+ for whole prompts; streams use the stream encoders instead."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file

from omnimem.backbones.video_salmonn2.audio import SEGMENT_SECONDS
from omnimem.backbones.video_salmonn2.configuration import is_qwen2_5
from omnimem.errors import OmniMemError

TOKENS_PER_SECOND = 2
"""Audio tokens per second."""

VIDEO, AUDIO, START, END = "<|video_pad|>", "<|audio_pad|>", "<|vision_start|>", "<|vision_end|>"


class VideoSalmonn2Processor(ProcessorMixin):
    """Prompts with one placeholder, ``<|video_pad|>`` for a video or ``<|audio_pad|>`` for audio alone.

    Parameters
    ----------
    image_processor, video_processor
        Those of the vision-language model.
    feature_extractor : WhisperFeatureExtractor
        Log-mel features of 30 s, 128 bins.
    tokenizer
        Tokenizer with the four special tokens of media.
    """

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        feature_extractor: WhisperFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, video_processor, feature_extractor, tokenizer, chat_template=chat_template)
        # The Qwen3-VL family writes timestamps between groups of patches.
        self.timestamps = isinstance(video_processor, Qwen3VLVideoProcessor)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> VideoSalmonn2Processor:  # pyright: ignore
        """Load a saved processor, or build one from a published folder, which lacks a feature extractor.

        The feature extractor then has the settings of Whisper-large-v3, as in the released code.
        """
        file = cached_file(path, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
        saved = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if saved.get("processor_class") == cls.__name__:
            return super().from_pretrained(path, **kwargs)  # pyright: ignore
        config, _ = PreTrainedConfig.get_config_dict(path)
        video = Qwen2VLVideoProcessor if is_qwen2_5(config) else Qwen3VLVideoProcessor
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(
            image_processor=Qwen2VLImageProcessor.from_pretrained(path),
            video_processor=video.from_pretrained(path),
            feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=SEGMENT_SECONDS),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
        )

    def __call__(
        self,
        text: str,
        frames: torch.Tensor | None = None,
        fps: float = 1.0,
        audio: np.ndarray | None = None,
        patches_per_group: int = 1,
        size: dict[str, int] | None = None,
    ) -> BatchFeature:
        """Tokenize one prompt and preprocess its media.

        Parameters
        ----------
        text : str
            Prompt, with a placeholder if there is media.
        frames : Tensor, optional
            uint8 ``[T, 3, H, W]``, sampled at `fps`.
        fps : float
            Frames per second.
        audio : ndarray, optional
            float32 ``[S]``, 16 kHz mono: the audio of the video, or audio alone.
        patches_per_group : int
            Temporal patches between two timestamps.
        size : dict, optional
            Pixel limits, as in the video processor.

        Returns
        -------
        BatchFeature
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` and, depending on the media,
            ``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts``, ``input_features``.

        Raises
        ------
        OmniMemError
            Placeholders and media do not match.
        """
        data: dict[str, Any] = {}
        audio_count = 0
        if audio is not None:
            data["input_features"] = log_mel_segments(self.feature_extractor, audio)
            audio_count = len(data["input_features"]) * SEGMENT_SECONDS * TOKENS_PER_SECOND
        placeholder = VIDEO if frames is not None else AUDIO
        expected = 0 if frames is None and audio is None else 1
        total = text.count(VIDEO) + text.count(AUDIO)
        if text.count(placeholder) != expected or total != expected:
            raise OmniMemError(f"the prompt needs one placeholder for its media and no other, got {text[:80]!r}")
        if frames is not None:
            limits = {} if size is None else {"size": size}
            data |= self.video_processor(
                videos=[frames], do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt", **limits
            )
            step = self.video_processor.temporal_patch_size
            if not self.timestamps:
                data["second_per_grid_ts"] = torch.tensor([step / fps])
            count, height, width = data["video_grid_thw"][0].tolist()
            patch = height * width // self.video_processor.merge_size**2
            times = [(step * i / fps + (min(step * (i + 1), len(frames)) - 1) / fps) / 2 for i in range(count)]
            expanded = self._video(count, patch, times, audio_count, step / fps, patches_per_group)
            marked = f"{START}{VIDEO}{END}"
            text = text.replace(marked, expanded) if marked in text else text.replace(VIDEO, expanded)
        elif audio is not None:
            text = text.replace(AUDIO, AUDIO * audio_count)
        ids = self.tokenizer(text, return_tensors="pt")
        kinds = torch.zeros_like(ids["input_ids"])
        # transformers marks video tokens with 2.
        kinds[ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(VIDEO)] = 2
        return BatchFeature({**ids, "mm_token_type_ids": kinds, **data})

    def _video(
        self, patches: int, patch: int, times: Sequence[float], audio_count: int, seconds: float, group: int
    ) -> str:
        """Placeholders of all patches and of the audio between them, remaining audio last."""
        if not self.timestamps:
            group = patches
        parts, audio_used = [], 0
        for first in range(0, patches, group):
            inside = range(first, min(first + group, patches))
            spans = [range(i, i + 1) for i in inside] if not self.timestamps else [inside]
            body = ""
            for span in spans:
                until = (
                    audio_count
                    if span.stop == patches
                    else min(audio_count, int(span.stop * seconds * TOKENS_PER_SECOND))
                )
                body += VIDEO * (patch * len(span)) + AUDIO * (until - audio_used)
                audio_used = until
            time = f"<{times[first]:.1f} seconds>" if self.timestamps else ""
            parts.append(f"{time}{START}{body}{END}")
        return "".join(parts)


def log_mel_segments(extractor: Any, audio: np.ndarray) -> torch.Tensor:
    """Log-mel features float32 ``[S, bins, 3000]`` of segments of 30 s, the last one padded with silence."""
    size = SEGMENT_SECONDS * extractor.sampling_rate
    count = math.ceil(len(audio) / size)
    pieces = [np.ascontiguousarray(audio[i * size : (i + 1) * size]) for i in range(count)]
    features = [
        extractor(piece, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        for piece in pieces
    ]
    return torch.cat(features) if features else torch.empty(0, extractor.feature_size, extractor.nb_max_frames)
