"""Position ids equal `get_rope_index` on the whole clip; mel features equal those of the transformers extractor."""

from __future__ import annotations

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch

from clips import WEBB
from omnimem.backbones.layout import largest_time_scale
from omnimem.backbones.mel import MelStream
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.stream_settings import StreamSettings

RATE = 16_000
QUESTION = "What is heard?"
SIDE = 56


def clip_chunks(
    fps: float, chunk_seconds: float, frames: int | None, samples: int | None, seed: int = 0
) -> list[Chunk]:
    """A synthetic clip cut into chunks: so many random frames at a rate, so many samples of noise."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 256, (frames or 0, SIDE, SIDE, 3), dtype=np.uint8)
    sound = None if samples is None else (generator.standard_normal(samples) * 0.1).astype(np.float32)
    seconds = max((frames or 0) / fps, (samples or 0) / RATE)
    chunks, t0 = [], 0.0
    while t0 < seconds:
        t1 = min(t0 + chunk_seconds, seconds)
        first, stop = (round(Fraction(t) * Fraction(fps).limit_denominator(1000)) for t in (t0, t0 + chunk_seconds))
        picked = pictures[first:stop]
        cut = (None, np.zeros(0, np.float32), np.zeros(0, np.float32))
        if sound is not None:
            a, b = int(t0 * RATE), int((t0 + chunk_seconds) * RATE)
            cut = (sound[a:b], sound[max(0, a - 1600) : a], sound[b : b + 1600])
        times = np.arange(first, first + len(picked)) / fps
        chunks.append(Chunk(len(chunks), t0, t1, picked, times, *cut, t0 + chunk_seconds >= seconds))
        t0 += chunk_seconds
    return chunks


def mel_frames(samples: int) -> int:
    return -(-samples // 160)


def reference_positions(backbone, fps: float, frames: int | None, samples: int | None):
    """Rotary ids and modalities of the whole clip and a question, by the transformers processor and model."""
    processor, config = backbone.processor, backbone.config
    audio_tokens = 0 if samples is None else ((mel_frames(samples) - 1) // 2 + 1 - 2) // 2 + 1
    extra = {}
    if frames is None:
        media = processor.audio_bos_token + processor.audio_token * audio_tokens + processor.audio_eos_token
    else:
        patches = -(-frames // 2)
        grid = torch.tensor([[patches, 8, 8]])
        inputs = {"video_grid_thw": grid, "video_second_per_grid": [2 / fps]}
        media = processor.video_token * (patches * 16)
        if samples is not None:
            media = processor.replace_video_with_audio_token(
                inputs, 0, {"num_audio_tokens": [audio_tokens]}, 0, position_id_per_seconds=25, seconds_per_chunk=2.0
            )
        media = processor.vision_bos_token + media + processor.vision_eos_token
        extra = {"video_grid_thw": grid, "second_per_grids": torch.tensor([2 / fps])}
    text = backbone.prompt_prefix + media + backbone.question_turn(QUESTION)
    ids = backbone.tokenizer(text, return_tensors="pt").input_ids
    positions, _ = backbone.model.model.get_rope_index(
        ids,
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=frames is not None and samples is not None,
        audio_seqlens=None if samples is None else torch.tensor([mel_frames(samples)]),
        **extra,
    )
    kinds = torch.full_like(ids, TEXT)
    kinds[ids == config.video_token_id] = VISUAL
    kinds[ids == config.audio_token_id] = AUDIO
    return positions[:, 0], kinds[0]


def streamed_positions(backbone, fps, chunk_seconds, frames, samples, **options):
    """The same from our encoder, chunk by chunk; also the seconds of each position."""
    encoder = backbone.stream_encoder(video=frames is not None, audio=samples is not None, fps=fps, **options)
    parts = [encoder.prefix()]
    for chunk in clip_chunks(fps, chunk_seconds, frames, samples):
        parts.append(encoder.encode(chunk))
    parts.append(encoder.closing())
    positions = torch.cat([part.position_ids[:, 0] for part in parts], 1)
    kinds = torch.cat([part.modality[0] for part in parts]).long()
    seconds = torch.cat([part.time[0] for part in parts])
    following = int(parts[-1].next_position_id[0])
    question = backbone.question_ids(QUESTION).shape[1]
    tail = torch.arange(following, following + question).expand(3, -1)
    kinds = torch.cat((kinds, torch.full((question,), TEXT)))
    return torch.cat((positions, tail), 1), kinds, seconds, encoder


LAYOUTS = {
    "both 8 s": (8, 8 * RATE),
    "audio half as long": (10, 5 * RATE),
    "audio ends inside a hop": (10, 5 * RATE + 77),
    "audio of a few samples": (10, 200),
    "audio ends early in the last group": (6, 43 * RATE // 10),
    "audio longer": (4, 11 * RATE),
    "audio much longer, odd tail": (2, 13 * RATE + 4321),
    "no audio": (9, None),
    "one frame": (1, None),
    "odd frames": (7, 7 * RATE),
    "odd frames, audio longer": (5, 9 * RATE),
    "audio only": (None, 9 * RATE + 333),
    "short audio only": (None, RATE // 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 4.0])
def test_position_ids_equal_the_reference_models_for_any_chunking(tiny, layout, fps):
    frames, samples = LAYOUTS[layout]
    if frames is not None and fps > 1:
        # The same seconds of video, one frame more or less where that makes the number odd.
        frames = int(frames * fps) - (frames % 2)
    expected, expected_kinds = reference_positions(tiny, fps, frames, samples)
    for chunk_seconds in (2, 6, 20):
        positions, kinds, _, _ = streamed_positions(tiny, fps, chunk_seconds, frames, samples)
        assert torch.equal(kinds, expected_kinds)
        assert torch.equal(positions, expected)


@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 4.0, 6.0])
def test_position_ids_equal_the_reference_models_over_minutes(tiny, fps, monkeypatch):
    """Rates that do not divide a second must not drift or fall into the wrong group after many patches."""
    frames, samples = int(64 * fps), 64 * RATE
    expected, expected_kinds = reference_positions(tiny, fps, frames, samples)
    skip_towers(tiny, monkeypatch)
    positions, kinds, _, _ = streamed_positions(tiny, fps, 8, frames, samples)
    assert torch.equal(kinds, expected_kinds)
    assert torch.equal(positions, expected)


def skip_towers(backbone, monkeypatch) -> None:
    """Position ids do not depend on what the encoders compute, so long clips can do without them."""
    from types import SimpleNamespace

    width = backbone.config.text_config.hidden_size
    monkeypatch.setattr(
        backbone.model,
        "get_video_features",
        lambda pixels, grid: SimpleNamespace(pooler_output=[torch.zeros(int(grid.prod()) // 4, width)]),
    )

    def sound(mel, feature_lens, aftercnn_lens):
        tokens = ((int(feature_lens) - 1) // 2 + 1 - 2) // 2 + 1
        return SimpleNamespace(last_hidden_state=torch.zeros(tokens, width))

    monkeypatch.setattr(backbone.model.model.audio_tower, "forward", sound)


def test_golden_position_ids_of_a_small_clip(tiny):
    """Written out by hand: get_rope_index has changed between releases ; this must not."""
    encoder = tiny.stream_encoder(video=True, audio=True, fps=1.0)
    prefix = encoder.prefix()
    text = prefix.position_ids.shape[2] - 2
    assert prefix.position_ids[0, 0].tolist() == [*range(text), text, text]
    start = text + 1
    inputs = [encoder.encode(chunk) for chunk in clip_chunks(1.0, 2, 4, 3 * RATE)]
    first, second = (part.position_ids[:, 0] for part in inputs)
    assert inputs[0].modality[0].tolist() == [VISUAL] * 16 + [AUDIO] * 50
    assert inputs[1].modality[0].tolist() == [VISUAL] * 16 + [AUDIO] * 25
    grid = [[h, w] for h in range(4) for w in range(4)]
    assert first[:, :16].T.tolist() == [[start, start + h, start + w] for h, w in grid]
    assert first[:, 16:].T.tolist() == [[start + i] * 3 for i in range(50)]
    assert second[:, :16].T.tolist() == [[start + 50, start + h, start + w] for h, w in grid]
    assert second[:, 16:].T.tolist() == [[start + 50 + i] * 3 for i in range(25)]
    # Audio is the last piece and ends at id 74; both closing tokens share the next one.
    assert encoder.closing().position_ids.unique().tolist() == [start + 75]
    assert encoder.closing().next_position_id.tolist() == [start + 76]


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_position_ids_follow_the_seconds(tiny, fps, monkeypatch):
    skip_towers(tiny, monkeypatch)
    frames = int(12 * fps)
    positions, kinds, seconds, encoder = streamed_positions(tiny, fps, 12, frames, 12 * RATE)
    seconds = torch.cat((seconds, torch.full((len(kinds) - len(seconds),), torch.nan)))
    assert torch.equal(seconds.isnan(), kinds == TEXT)
    visual = seconds[kinds == VISUAL].reshape(-1, 16)
    assert torch.allclose(visual[:, 0], torch.arange(len(visual)) * 2 / fps)
    assert torch.equal(visual, visual[:, :1].expand_as(visual))
    assert torch.allclose(seconds[kinds == AUDIO], torch.arange(300) / 25)
    # 25 rotary ids a second, rounded down.
    ids = positions[0] - encoder.start
    for kind in (VISUAL, AUDIO):
        of_kind = kinds == kind
        assert ((ids[of_kind] - seconds[of_kind] * 25).abs() < 1 + 1e-3).all()


# ---- alignment of chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "seconds"),
    [(0.5, 4), (0.25, 8), (1, 2), (2, 2), (3, 2), (4, 2), (1.5, 4), (25, 2), (0.2, 10), (2.5, 4), (0.1, 20)],
)
def test_the_alignment_holds_whole_audio_blocks_and_whole_patches(tiny, fps, seconds):
    assert tiny.chunk_alignment(fps) == seconds
    assert seconds / 2 == round(seconds / 2)
    frames = Fraction(fps).limit_denominator(1000) * seconds
    assert frames.denominator == 1 and frames % 2 == 0


def test_half_a_frame_a_second_is_streamed_in_time_order_however_it_is_cut(tiny, monkeypatch):
    skip_towers(tiny, monkeypatch)
    frames, samples = 9, 17 * RATE
    results = [streamed_positions(tiny, 0.5, seconds, frames, samples) for seconds in (4, 8, 20)]
    for positions, kinds, _, _ in results[1:]:
        assert torch.equal(positions, results[0][0]) and torch.equal(kinds, results[0][1])
    positions, kinds, seconds, _ = results[0]
    # The transformers layout advances one group per patch, ahead of the audio; the position ids are the same.
    expected, expected_kinds = reference_positions(tiny, 0.5, frames, samples)
    for kind in (VISUAL, AUDIO):
        assert torch.equal(positions[:, kinds == kind], expected[:, expected_kinds == kind])
    media = seconds[~seconds.isnan()]
    groups = (media / 2 + 1e-6).floor()
    assert (groups.diff() >= 0).all()


@pytest.mark.parametrize(("fps", "t0"), [(1.0, 1.0), (1.0, 3.0), (2.0, 0.5), (0.5, 2.0), (3.0, 1 / 3)])
def test_a_chunk_that_starts_inside_a_block_is_refused(tiny, fps, t0):
    encoder = tiny.stream_encoder(video=True, audio=True, fps=fps)
    encoder.prefix()
    frames = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    empty = np.zeros(0, np.float32)
    chunk = Chunk(1, t0, t0 + 4, frames, np.zeros(2), np.zeros(RATE, np.float32), empty, empty, True)
    with pytest.raises(OmniMemError, match=f"multiple of {tiny.chunk_alignment(fps):g}") as error:
        encoder.encode(chunk)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fps", "seconds"), [(1.0, 3), (1.0, 1), (0.5, 2), (0.5, 6), (2.0, 0.5), (1.5, 2)])
def test_a_chunk_length_that_does_not_fit_is_refused_before_anything_is_read(tiny, fps, seconds):
    with pytest.raises(OmniMemError, match="multiple of") as error:
        StreamSettings(fps=fps, chunk_seconds=seconds).open(WEBB, tiny)
    assert "\n" not in str(error.value)


def test_a_stream_of_nothing_is_refused(tiny):
    with pytest.raises(OmniMemError, match="neither video nor audio"):
        tiny.stream_encoder(video=False, audio=False, fps=1.0)


# ---- long streams --------------------------------------------------------------------------------------------------


def test_time_scale_keeps_a_long_stream_inside_the_trained_range(tiny, monkeypatch, caplog):
    skip_towers(tiny, monkeypatch)
    limit = 2048
    monkeypatch.setattr(tiny.config.text_config, "max_position_embeddings", limit)
    with caplog.at_level(logging.INFO, logger="omnimem"):
        positions, kinds, _, encoder = streamed_positions(tiny, 1.0, 20, 100, 100 * RATE, duration=100.0)
    assert 0 < encoder.time_scale < 1
    assert "trained range" in caplog.text
    assert int(positions.max()) < limit - 512, "room for the question and its answer"
    # Both modalities shrink together and never run backwards.
    for kind in (VISUAL, AUDIO):
        assert (positions[0, kinds == kind].diff() >= 0).all()
    last_sound = positions[0, kinds == AUDIO].max() - encoder.start
    last_picture = positions[0, kinds == VISUAL].max() - encoder.start
    assert abs(int(last_sound) - int(last_picture)) <= 2 * 25 * encoder.time_scale + 1
    assert last_sound >= 0.95 * (limit - 1024 - encoder.start)


def test_time_scale_leaves_ordinary_streams_alone(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="omnimem"):
        encoder = tiny.stream_encoder(video=True, audio=True, fps=1.0, duration=1200.0)
    assert encoder.time_scale == 1.0
    assert not caplog.records


@pytest.mark.parametrize("duration", [1261, 1500, 3600, 36_000, 360_000])
def test_chosen_scales_use_the_range_and_stay_inside_it(duration):
    limit, reserve = 32768, 1100
    scale = largest_time_scale(duration, 25, limit, reserve)
    assert scale <= 1
    assert duration * 25 * scale + reserve <= limit + 1e-6
    assert scale == 1 or duration * 25 * scale + reserve == pytest.approx(limit)
    assert largest_time_scale(None, 25, limit, reserve) == 1.0


def test_a_stream_of_unknown_length_warns_once_when_it_leaves_the_trained_range(tiny, monkeypatch, caplog):
    skip_towers(tiny, monkeypatch)
    monkeypatch.setattr(tiny.config.text_config, "max_position_embeddings", 300)
    with caplog.at_level(logging.WARNING, logger="omnimem"):
        streamed_positions(tiny, 1.0, 4, 40, 40 * RATE, duration=None)
    assert len(caplog.records) == 1
    assert "300" in caplog.text and "time_scale" in caplog.text


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_a_given_time_scale_is_used(tiny, monkeypatch, scale):
    skip_towers(tiny, monkeypatch)
    positions, kinds, _, encoder = streamed_positions(tiny, 1.0, 4, 20, 20 * RATE, time_scale=scale)
    visual = positions[0, kinds == VISUAL].reshape(-1, 16)[:, 0] - encoder.start
    assert visual.tolist() == [int(i * 50 * scale + 1e-4) for i in range(10)]
    sound = positions[0, kinds == AUDIO] - encoder.start
    assert (sound - torch.arange(500) * scale).abs().max() < 1


# ---- audio features ------------------------------------------------------------------------------------------------


def speech_like(samples: int) -> np.ndarray:
    """Loud and silent stretches, so that the floor below the loudest point matters."""
    generator = np.random.default_rng(1)
    envelope = np.repeat(generator.choice([1e-6, 1e-3, 0.3], samples // 4000 + 1), 4000)[:samples]
    return (generator.standard_normal(samples) * envelope).astype(np.float32)


def sound_chunks(sound: np.ndarray, seconds: float) -> list[Chunk]:
    size = int(seconds * RATE)
    none = np.zeros((0, 2, 2, 3), np.uint8)
    return [
        Chunk(
            i, a / RATE, min(a + size, len(sound)) / RATE, none, np.zeros(0), sound[a : a + size],
            sound[max(0, a - 1600) : a], sound[a + size : a + size + 1600], a + size >= len(sound),
        )
        for i, a in enumerate(range(0, len(sound), size))
    ]  # fmt: skip


def streamed_mel(extractor, sound, seconds, floor="running") -> torch.Tensor:
    mel = MelStream(extractor, 200, floor)
    return torch.cat([mel.frames(chunk) for chunk in sound_chunks(sound, seconds)], dim=1)


def reference_mel(extractor, sound: np.ndarray) -> torch.Tensor:
    # The processor pads far beyond the audio; a short pad of zeros gives the same windows at the end.
    padded = np.pad(sound, (0, 1600))
    features = extractor(padded, sampling_rate=RATE, padding="longest", truncation=False, return_tensors="pt")
    return features["input_features"][0][:, : mel_frames(len(sound))]


@pytest.mark.parametrize("samples", [7 * RATE, 7 * RATE + 123, 2 * RATE, 2 * RATE + 1, 150, 5000])
@pytest.mark.parametrize("seconds", [2, 4, 20])
def test_mel_of_a_stream_equals_the_reference_extractor_when_the_floor_is_the_clips(tiny, samples, seconds):
    extractor, sound = tiny.processor.feature_extractor, speech_like(samples)
    expected = reference_mel(extractor, sound)
    loudest = float(expected.max()) * 4 - 4
    ours = streamed_mel(extractor, sound, seconds, floor=loudest)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 2e-5
    # And the floor is at work: some of it is cut.
    if samples > 3 * RATE:
        assert (ours == ours.min()).float().mean() > 0.05


def test_the_running_floor_does_not_depend_on_the_chunking(tiny):
    extractor, sound = tiny.processor.feature_extractor, speech_like(21 * RATE + 777)
    whole = streamed_mel(extractor, sound, 40)
    for seconds in (2, 4, 6, 10):
        assert torch.equal(streamed_mel(extractor, sound, seconds), whole)


def test_the_running_floor_never_looks_ahead(tiny):
    extractor, sound = tiny.processor.feature_extractor, speech_like(12 * RATE)
    louder = sound.copy()
    louder[8 * RATE :] *= 50
    before = 8 * 100 - 2  # frames whose window ends before the change
    ours, theirs = (streamed_mel(extractor, one, 4)[:, :600] for one in (sound, louder))
    assert before > 600
    assert torch.equal(ours, theirs)


def test_the_running_floor_is_the_reference_floor_once_the_loudest_point_has_passed(tiny):
    extractor, sound = tiny.processor.feature_extractor, speech_like(8 * RATE)
    sound[1000:1400] = 0.9
    assert (streamed_mel(extractor, sound, 2) - reference_mel(extractor, sound)).abs().max() <= 2e-5


def test_silence_is_encoded_without_special_cases(tiny):
    mel = streamed_mel(tiny.processor.feature_extractor, np.zeros(5 * RATE, np.float32), 2)
    assert mel.shape == (128, 500) and mel.isfinite().all()
    encoder = tiny.stream_encoder(video=False, audio=True, fps=1.0)
    encoder.prefix()
    for chunk in sound_chunks(np.zeros(5 * RATE, np.float32), 2):
        assert encoder.encode(chunk).embeds.isfinite().all()


def test_without_a_chunk_length_the_shortest_of_ten_seconds_that_fits_is_taken(tiny):
    assert StreamSettings.for_backbone(tiny).chunk_seconds == 10
    assert StreamSettings.for_backbone(tiny, fps=1.5).chunk_seconds == 12
    assert StreamSettings.for_backbone(tiny, chunk_seconds=3).chunk_seconds == 3
