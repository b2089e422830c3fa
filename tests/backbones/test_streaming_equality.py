"""With budgets at least as long as the stream, streaming equals one full prefill of the transformers model.

The reference is transformers: its processor on the whole clip, `model(...)`, its attention and its position ids.
Streaming cuts the same clip into chunks, encodes each chunk alone and carries a compressed cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from clips import RABBIT, WEBB
from omnimem.backbones import Backbone, ChunkInputs
from omnimem.backbones.mel import MelStream
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.media import open_media
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection

QUESTION = "What is seen and what is heard?"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def whole_clip(path: Path, fps: float, **options) -> tuple[np.ndarray, np.ndarray | None]:
    chunks = list(open_media(path, fps=fps, chunk_seconds=4, **options))
    audio = None if chunks[0].audio is None else np.concatenate([chunk.audio for chunk in chunks])
    return np.concatenate([chunk.frames for chunk in chunks]), audio


def reference_inputs(backbone: Backbone, frames: np.ndarray, audio: np.ndarray | None, fps: float) -> dict:
    text = backbone.prompt_prefix + "<|vision_bos|><|VIDEO|><|vision_eos|>" + backbone.question_turn(QUESTION)
    sound = {}
    if audio is not None:
        sound = {
            "audio": [audio],
            "audio_from_video_indices": [0],
            "load_audio_from_video": True,
            "audio_kwargs": {"truncation": False},
        }
    return backbone.processor(
        text=text,
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        videos_kwargs={
            "fps": fps,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "size": backbone.pixel_limits().size,
        },
        return_tensors="pt",
        **sound,
    )


@torch.no_grad()
def reference_logits(path: Path, dtype: torch.dtype, backbone: Backbone, frames, audio, fps: float):
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    inputs = reference_inputs(backbone, frames, audio, fps)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=audio is not None,
        audio_seqlens=inputs["feature_attention_mask"].sum(-1) if audio is not None else None,
        second_per_grids=torch.as_tensor(inputs["video_second_per_grid"]),
    )
    for name in ("pixel_values_videos", "input_features"):
        if name in inputs:
            inputs[name] = inputs[name].to(dtype)
    logits = model(**inputs, use_audio_in_video=audio is not None).logits
    return logits, positions, inputs


def clip_loudness(backbone: Backbone, audio: np.ndarray | None) -> float | str:
    """Loudest log10 mel power of the clip: the floor the transformers extractor uses."""
    if audio is None:
        return "running"
    stream = MelStream(backbone.processor.feature_extractor, 200, floor=-100.0)
    from omnimem.media import Chunk

    empty = np.zeros(0, np.float32)
    chunk = Chunk(0, 0.0, len(audio) / 16000, np.zeros((0, 2, 2, 3), np.uint8), empty, audio, empty, empty, True)
    return (stream.frames(chunk) * 4 - 4).max().item()


@torch.no_grad()
def streamed_logits(backbone: Backbone, path: Path, fps: float, chunk_seconds: float, floor, **options):
    profile = BudgetProfile.uniform(backbone.config, mean=4000, ratio=1.0)
    cache = CompressedCache(profile, build_selection("omnimem"))
    stream = Stream(backbone, cache)
    reader = open_media(path, fps=fps, chunk_seconds=chunk_seconds, **options)
    encoder = backbone.stream_encoder(
        video=reader.info.has_video,
        audio=reader.info.has_audio and options.get("audio", True),
        fps=fps,
        duration=reader.info.duration,
        mel_floor=floor,
    )
    hidden = [stream.forward(encoder.prefix(), text=True)]
    for chunk in reader:
        inputs = encoder.encode(chunk)
        if len(inputs):
            hidden.append(stream.forward(inputs))
            cache.compress()
    hidden.append(stream.forward(encoder.closing(), text=True))
    question = ChunkInputs.text(backbone.embed(backbone.question_ids(QUESTION)), int(cache.next_position_id[0]))
    hidden.append(stream.forward(question, text=True))
    return backbone.lm_head(torch.cat(hidden, dim=1)), cache.token_metadata(0).position_ids.permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("clip", "fps", "options"),
    [
        (WEBB, 1.0, {}),
        (WEBB, 2.0, {}),
        (RABBIT, 1.0, {"audio": False}),
        (RABBIT, 1.0, {"max_seconds": 5.3}),
    ],
    ids=["with-audio", "2fps", "no-audio", "odd-length"],
)
def test_streaming_equals_reference_prefill(tiny, tiny64, tiny_path, clip, fps, options, dtype):
    backbone = tiny if dtype == torch.float32 else tiny64
    frames, audio = whole_clip(clip, fps, **options)
    expected, positions, _ = reference_logits(tiny_path, dtype, backbone, frames, audio, fps)
    floor = clip_loudness(backbone, audio)
    for chunk_seconds in (2, 6, 20):
        logits, streamed_positions = streamed_logits(backbone, clip, fps, chunk_seconds, floor, **options)
        assert logits.shape == expected.shape
        assert torch.equal(streamed_positions, positions)
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
