"""Qwen3-Omni: a stream equals the transformers model on the whole clip, and its checkpoint is complete or refused.

The reference is transformers: its processor on the whole clip, `model(...)` and position ids.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_position_ids import clip_chunks
from transformers import Qwen3OmniMoeProcessor, Qwen3OmniMoeThinkerForConditionalGeneration

from clips import MEDIA, RABBIT, WEBB
from omnimem import StreamingSession
from omnimem.backbones import load_backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.mel import MelStream
from omnimem.backbones.qwen3_omni.stream_encoder import audio_tokens
from omnimem.backbones.qwen3_omni.tiny import SPECIAL_TOKENS, build_tiny, tiny_config
from omnimem.backbones.tiny import tiny_tokenizer
from omnimem.bptt import ChunkwiseBPTT
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory import CompressedCache
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import build_selection
from omnimem.stream_settings import StreamSettings
from reference_models import QUESTION, TOLERANCE, Whole, streamed, whole_clip
from small_runs import arguments, main, trained_run

Reference = Qwen3OmniMoeThinkerForConditionalGeneration
RATE = 16_000
JFK = MEDIA / "audio_speech_jfk_11s.flac"
TIMECODE = MEDIA / "speech_burned_in_timecode_42s.mp4"


def rebuilt(folder: Path, **options) -> Path:
    """A tiny checkpoint whose biases are not zero: those of the tower's convolutions reach into what is padded."""
    path = build_tiny(folder, **options)
    weights, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in (name for name in sorted(weights) if name.endswith(".bias")):
        weights[name] += torch.randn(weights[name].shape, generator=generator) * 0.3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return rebuilt(tmp_path_factory.mktemp("models") / "qwen3_omni")


@pytest.fixture(scope="module")
def backbone(path):
    return load_backbone(path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def backbone64(path):
    return load_backbone(path, dtype=torch.float64, device="cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With the published window of the audio tower."""
    path = rebuilt(tmp_path_factory.mktemp("models") / "wide", audio_window=800)
    return load_backbone(path, dtype=torch.float32, device="cpu")


def reference_model(path: Path, dtype: torch.dtype = torch.float32):
    with quiet_transformers():
        model = Reference.from_pretrained(path, dtype=dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default takes no double precision
    return model


# ---- against the transformers model on the whole clip ----------------------------------------------------------------


def reference_inputs(backbone, clip: Whole | None, audio: np.ndarray | None) -> dict:
    """What the transformers processor makes of a clip and a question."""
    text = "<|audio_start|><|audio_pad|><|audio_end|>"
    media: dict = {}
    if clip is not None:
        text = "<|vision_start|><|video_pad|><|vision_end|>"
        kwargs = {"fps": clip.fps, "do_sample_frames": False, "cap_pixels_per_frame": False}
        media = {"videos": [clip.video], "videos_kwargs": {**kwargs, "size": backbone.pixel_limits().size}}
    if audio is not None:
        media["audio"] = [audio]
        if clip is not None:
            media |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    return backbone.processor(
        text=backbone.prompt_prefix + text + backbone.question_turn(QUESTION), return_tensors="pt", **media
    )


@torch.no_grad()
def reference_run(backbone, path: Path, dtype: torch.dtype, clip: Whole | None, audio: np.ndarray | None):
    """Transformers logits and rotary ids."""
    model = reference_model(path, dtype)
    inputs = reference_inputs(backbone, clip, audio)
    both = clip is not None and audio is not None
    positions, _ = model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=both,
        audio_seqlens=inputs["feature_attention_mask"].sum(-1) if audio is not None else None,
        second_per_grids=torch.as_tensor(inputs["video_second_per_grid"]) if clip is not None else None,
    )
    for name in ("pixel_values_videos", "input_features"):
        if name in inputs:
            inputs[name] = inputs[name].to(dtype)
    return model(**inputs, use_audio_in_video=both).logits, positions


def loudness(backbone, audio: np.ndarray | None) -> float | str:
    """Loudest log10 mel power of the clip: the floor the transformers extractor uses."""
    if audio is None:
        return "running"
    stream = MelStream(backbone.processor.feature_extractor, 10**9, floor=-100.0, reflect_end=True)
    none = np.zeros(0, np.float32)
    whole = Chunk(0, 0.0, len(audio) / RATE, np.zeros((0, 2, 2, 3), np.uint8), none, audio, none, none, True)
    return (stream.frames(whole) * 4 - 4).max().item()


def compare(backbone, path, clip, fps, dtype, lengths, **options) -> float:
    """Largest difference of logits to the transformers run; the rotary ids are the same."""
    picture = clip not in (JFK,)
    whole = whole_clip(clip, fps, **options)
    expected, positions = reference_run(backbone, path, dtype, whole if picture else None, whole.audio)
    floor = loudness(backbone, whole.audio)
    worst = 0.0
    for chunk_seconds in lengths:
        logits, ids, _ = streamed(backbone, clip, fps, chunk_seconds, {"mel_floor": floor}, **options)
        assert logits.shape == expected.shape
        assert ids.dtype == torch.float32 and torch.equal(ids, positions.to(ids.dtype))
        worst = max(worst, (logits - expected).abs().max().item())
    print(f"{clip.name} {fps} {dtype}: {worst:.1e}")
    return worst


CLIPS = {
    "with audio": (WEBB, 1.0, {}),
    "2 fps": (WEBB, 2.0, {"max_seconds": 8.7}),
    "no audio": (RABBIT, 1.0, {"audio": False}),
    "odd length": (RABBIT, 1.0, {"max_seconds": 5.3}),
    "a tail of half a second": (WEBB, 1.0, {"max_seconds": 4.53}),
    "audio alone": (JFK, 1.0, {"max_seconds": 6.41}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CLIPS)
def test_streaming_equals_reference_prefill(backbone, backbone64, path, name, dtype):
    clip, fps, options = CLIPS[name]
    model = backbone if dtype == torch.float32 else backbone64
    assert compare(model, path, clip, fps, dtype, (2, 4, 20), **options) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["with audio", "2 fps"])
def test_with_the_published_window_of_eight_seconds_too(wide, name):
    clip, fps, options = CLIPS[name]
    assert compare(wide, Path(wide.model_id), clip, fps, torch.float32, (8, 16), **options) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("fps", [1.0, 2.0])
def test_longer_clips(wide, fps):
    for clip, options in ((TIMECODE, {"max_seconds": 41.27}), (JFK, {}), (RABBIT, {}), (TIMECODE, {"audio": False})):
        assert compare(wide, Path(wide.model_id), clip, fps, torch.float32, (8, 24), **options) <= 1e-5


def test_what_is_compared_can_be_told_apart(backbone, path):
    """The clip's own loudest point is given to the streams above; without it they would differ."""
    clip, fps, options = CLIPS["with audio"]
    whole = whole_clip(clip, fps, **options)
    expected, _ = reference_run(backbone, path, torch.float32, whole, whole.audio)
    logits, _, _ = streamed(backbone, clip, fps, 4, **options)
    assert 1e-4 < (logits - expected).abs().max() < 1.0


# ---- layout and position ids ---------------------------------------------------------------------------------------


def skip_towers(backbone, monkeypatch) -> None:
    """Layout and position ids do not depend on what the encoders compute, so long clips can do without them."""
    width = backbone.config.text_config.hidden_size

    def video(pixels, grid):
        maps = torch.zeros(int(grid.prod()) // 4, width)
        return SimpleNamespace(pooler_output=[maps], deepstack_features=[[maps]] * 3)

    def sound(mel, feature_lens):
        count = sum(audio_tokens(frames, 100) for frames in feature_lens.tolist())
        return SimpleNamespace(last_hidden_state=torch.zeros(count, width))

    monkeypatch.setattr(backbone.model, "get_video_features", video)
    monkeypatch.setattr(backbone.model.model.audio_tower, "forward", sound)
    monkeypatch.setattr(MelStream, "_block", lambda self, signal, start, stop: torch.zeros(128, stop - start))


def reference_positions(backbone, fps: float, frames: int | None, samples: int | None):
    """Rotary ids and modalities of a whole clip and a question, by the transformers processor and model."""
    processor, config = backbone.processor, backbone.config
    heard = None if samples is None else torch.tensor([samples // 160])
    tokens = 0 if samples is None else audio_tokens(samples // 160, 100)
    extra = {}
    if frames is None:
        media = processor.audio_bos_token + processor.audio_token * tokens + processor.audio_eos_token
    else:
        grid = torch.tensor([[-(-frames // 2), 8, 8]])
        inputs = {"video_grid_thw": grid, "video_second_per_grid": [2 / fps]}
        media = processor.video_token * int(grid.prod() // 4)
        if samples is not None:
            media = processor.replace_video_with_audio_token(
                inputs, 0, {"num_audio_tokens": torch.tensor([tokens])}, 0, position_id_per_seconds=13.0
            )
        media = processor.vision_bos_token + media + processor.vision_eos_token
        extra = {"video_grid_thw": grid, "second_per_grids": torch.tensor([2 / fps])}
    text = backbone.prompt_prefix + media + backbone.question_turn(QUESTION)
    ids = backbone.tokenizer(text, return_tensors="pt").input_ids
    positions, _ = backbone.model.get_rope_index(
        ids,
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=frames is not None and samples is not None,
        audio_seqlens=heard,
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
    question = backbone.question_ids(QUESTION)
    tail = parts[-1].next_position_id[:, None] + torch.arange(question.shape[1])
    positions = torch.cat([*(part.position_ids[:, 0] for part in parts), tail.expand(3, -1)], 1)
    kinds = torch.cat([*(part.modality[0] for part in parts), torch.full((question.shape[1],), TEXT)]).long()
    seconds = torch.cat([*(part.time[0] for part in parts), torch.full((question.shape[1],), torch.nan)])
    return positions, kinds, seconds, encoder


LAYOUTS = {
    "both 8 s": (8.0, 8 * RATE),
    "audio half as long": (10.0, 5 * RATE),
    "audio ends inside a hop": (10.0, 5 * RATE + 77),
    "audio of a few samples": (10.0, 250),
    "audio longer": (4.0, 11 * RATE),
    "audio much longer, odd tail": (2.0, 43 * RATE + 4321),
    "audio ends where a chunk does": (24.0, 16 * RATE),
    "audio ends right behind a chunk": (24.0, 16 * RATE + 200),
    "no audio": (9.0, None),
    "odd frames": (7.0, 7 * RATE),
    "odd frames, audio longer": (5.0, 9 * RATE),
    "audio only": (None, 9 * RATE + 333),
    "short audio only": (None, RATE // 2),
    "a minute": (61.0, 62 * RATE + 801),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "fps", [0.5, 2.0, 3.0, *(pytest.param(fps, marks=pytest.mark.long) for fps in (1.0, 4.0, 6.0))]
)
@pytest.mark.parametrize("size", ["backbone", "wide"])
def test_position_ids_equal_the_reference_models_for_any_chunking(layout, fps, size, request, monkeypatch):
    model = request.getfixturevalue(size)
    skip_towers(model, monkeypatch)
    seconds, samples = LAYOUTS[layout]
    frames = None if seconds is None else round(seconds * fps)
    expected, expected_kinds = reference_positions(model, fps, frames, samples)
    alignment = model.chunk_alignment(fps, samples is not None)
    for times in (1, 3, 10):
        positions, kinds, _, _ = streamed_positions(model, fps, times * alignment, frames, samples)
        assert torch.equal(kinds, expected_kinds)
        assert positions.dtype == torch.float32 and torch.equal(positions, expected)


@pytest.mark.parametrize(
    ("fps", "sound", "seconds"),
    [(1, True, 8), (2, True, 8), (0.25, True, 8), (0.2, True, 40), (3, True, 8), (1, False, 2)],
)
def test_the_alignment_holds_whole_windows_of_the_audio_tower_and_whole_patches(wide, fps, sound, seconds):
    assert wide.chunk_alignment(fps, sound) == seconds
    with pytest.raises(OmniMemError, match=f"multiple of {seconds}"):
        StreamSettings(fps=fps, chunk_seconds=seconds / 2, audio=sound).check(wide)


def test_a_chunk_that_starts_inside_a_window_is_refused(wide):
    encoder = wide.stream_encoder(video=True, audio=True, fps=1.0)
    encoder.prefix()
    none = np.zeros(0, np.float32)
    chunk = Chunk(
        1, 4.0, 8.0, np.zeros((2, 56, 56, 3), np.uint8), np.zeros(2), np.zeros(RATE, np.float32), none, none, True
    )
    with pytest.raises(OmniMemError, match="multiple of 8 s"):
        encoder.encode(chunk)


@pytest.mark.parametrize("fps", [1.0, 3.0])
def test_position_ids_follow_the_seconds(backbone, monkeypatch, fps):
    skip_towers(backbone, monkeypatch)
    positions, kinds, seconds, encoder = streamed_positions(backbone, fps, 4, round(12 * fps), 12 * RATE)
    assert torch.equal(seconds.isnan(), kinds == TEXT)
    assert torch.allclose(seconds[kinds == VISUAL].view(-1, 16)[:, 0], torch.arange(6 * fps) * 2 / fps)
    assert torch.allclose(seconds[kinds == AUDIO], torch.arange(156) / 13)
    media = kinds != TEXT
    assert torch.allclose(positions[0, media] - encoder.start, seconds[media] * 13, atol=1e-3)
    assert (seconds[media].diff() >= 0).all(), "merged by time"


def test_time_scale_keeps_a_long_stream_inside_the_trained_range(backbone, monkeypatch, caplog):
    skip_towers(backbone, monkeypatch)
    monkeypatch.setattr(backbone.config.text_config, "max_position_embeddings", 1600)
    with caplog.at_level(logging.INFO, logger="omnimem"):
        positions, kinds, seconds, encoder = streamed_positions(backbone, 1.0, 20, 100, 100 * RATE, duration=100.0)
    assert 0 < encoder.time_scale < 1 and "trained range" in caplog.text
    assert positions.max() < 1600 - 512, "room for the question and its answer"
    # Nothing is rounded: both modalities shrink together and keep their order.
    media = kinds != TEXT
    per_second = 13 * encoder.time_scale
    assert torch.allclose(positions[0, media] - encoder.start, seconds[media] * per_second, atol=1e-3)
    as_trained, same, _, _ = streamed_positions(backbone, 1.0, 20, 100, 100 * RATE)
    assert torch.equal(kinds, same) and as_trained.max() > 1300


@pytest.mark.parametrize("samples", [7 * RATE, 7 * RATE + 123, 4 * RATE + 100, 2 * RATE, 2 * RATE + 1, 250, 5000])
def test_mel_of_a_stream_equals_the_reference_processors(backbone, samples):
    """Which does not pad: the end is reflected like the start, and a started hop makes no frame."""
    chunks = clip_chunks(1.0, 2, None, samples)
    sound = np.concatenate([chunk.audio for chunk in chunks])
    text = "<|audio_start|><|audio_pad|><|audio_end|>"
    reference = backbone.processor(text=text, audio=[sound], return_tensors="pt")
    frames = int(reference["feature_attention_mask"].sum())
    assert reference["input_ids"].shape[1] == 2 + audio_tokens(frames, 100) and frames == samples // 160
    mel = MelStream(backbone.processor.feature_extractor, 200, loudness(backbone, sound), reflect_end=True)
    ours = torch.cat([mel.frames(chunk) for chunk in chunks], dim=1)
    assert torch.allclose(ours, reference["input_features"][0], atol=2e-5)


# ---- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [1.0, 3.0, 4.0])
def test_an_answer_goes_on_as_reference_generate_does(backbone, path, fps):
    """Also where the ids of what follows the media are no whole numbers."""
    whole = whole_clip(RABBIT, fps, audio=False)
    inputs = reference_inputs(backbone, whole, None)
    count = {"max_new_tokens": 16, "min_new_tokens": 16}
    given = reference_model(path).generate(**inputs, **count, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    settings = StreamSettings(fps=fps, chunk_seconds=4, audio=False)
    session = StreamingSession(backbone, BudgetProfile.uniform(backbone.config, 4000, 1.0), settings=settings)
    for _ in session.watch(RABBIT):
        pass
    assert session.ask(QUESTION, **count) == backbone.tokenizer.decode(given, skip_special_tokens=True) != ""
    assert (session.cache.next_position_id % 1 != 0).item() == (fps > 2)


def test_a_fraction_is_not_rounded_away_beside_the_count_of_a_long_stream(backbone):
    session = StreamingSession(backbone, BudgetProfile.uniform(backbone.config, 40))
    session.cache.next_position_id = torch.tensor([46_000 + 1 / 3])
    session.cache.get_seq_length = lambda: 443_000  # one hour
    assert torch.equal((session.cache.rope_deltas + 443_000).float()[:, 0], session.cache.next_position_id)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_small_memory_holds_visual_and_audio_tokens(backbone, positions):
    profile = BudgetProfile.uniform(backbone.config, 40)
    assert profile.model == ModelFingerprint("qwen3_omni_moe_text", 4, 2, 16)
    settings = StreamSettings(fps=3.0, chunk_seconds=2)
    session = StreamingSession(backbone, profile, settings=settings, position_ids=positions)
    events = list(session.watch(RABBIT))
    assert events[-1].retained == {
        "text": len(backbone.text_ids(backbone.prompt_prefix)[0]) + 2,
        "visual": 33,
        "audio": 7,
    }
    assert session.ask("What is heard?", max_new_tokens=4, min_new_tokens=4)
    assert 0 < session.score_answer("What is heard?", "Room noise.") < 20


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_tiny_checkpoint_has_the_published_layout(tmp_path):
    """Names as in the index of Qwen3-Omni-30B-A3B-Instruct; what is loaded is what was built."""
    path = build_tiny(tmp_path / "tiny")
    keys = set(load_file(path / "model.safetensors"))
    layer = "thinker.model.layers.3"
    assert {
        "thinker.model.embed_tokens.weight",
        "thinker.model.norm.weight",
        "thinker.lm_head.weight",
        f"{layer}.self_attn.q_norm.weight",
        f"{layer}.mlp.gate.weight",
        *(f"{layer}.mlp.experts.{i}.{kind}_proj.weight" for i in range(4) for kind in ("gate", "up", "down")),
        "thinker.visual.merger.ln_q.weight",
        "thinker.visual.merger_list.2.mlp.2.bias",
        "thinker.audio_tower.conv2d1.weight",
        "thinker.audio_tower.conv_out.weight",
        "thinker.audio_tower.proj2.bias",
    } <= keys
    assert all(re.match(r"thinker\.(model|visual|audio_tower|lm_head)\.", key) for key in keys)
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "qwen3_omni_moe" and config["thinker_config"]["position_id_per_seconds"] == 13
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        built = Reference(tiny_config(tiny_tokenizer(SPECIAL_TOKENS))).state_dict()
    loaded = load_backbone(path, dtype=torch.float32, device="cpu").model.state_dict()
    assert built.keys() == loaded.keys() and all(torch.equal(built[name], loaded[name]) for name in built)


def changed(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(path, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


LACKING = [
    "model.layers.2.mlp.experts.1.down_proj.weight",
    "model.layers.2.mlp.experts.3.gate_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "visual.merger_list.1.mlp.0.weight",
    "audio_tower.proj2.bias",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", LACKING)
def test_a_weight_that_is_missing_is_named(path, tmp_path, name):
    broken = changed(path, tmp_path / "broken", lambda weights: weights.pop(f"thinker.{name}"))
    with pytest.raises(OmniMemError, match=f"1 missing keys: .*{name.split('model.')[-1]}") as error:
        load_backbone(broken, dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["layers.2.mlp.experts.4.up_proj.weight", "layers.9.mlp.gate.weight"])
def test_a_weight_too_many_is_named(path, tmp_path, name):
    more = {f"thinker.model.{name}": torch.zeros(64, 64)}
    with pytest.raises(OmniMemError, match=f"1 unexpected keys: .*{name}") as error:
        load_backbone(changed(path, tmp_path / "broken", lambda weights: weights.update(more)), device="cpu")
    assert "\n" not in str(error.value)


def test_the_talker_of_a_published_checkpoint_is_left_out(path, tmp_path):
    more = {name: torch.zeros(2) for name in ("talker.model.norm.weight", "code2wav.decoder.0.bias")}
    whole = changed(path, tmp_path / "whole", lambda weights: weights.update(more))
    plain, loaded = (load_backbone(one, dtype="float32", device="cpu").model.state_dict() for one in (path, whole))
    assert plain.keys() == loaded.keys() and all(torch.equal(plain[name], loaded[name]) for name in plain)


# ---- training ------------------------------------------------------------------------------------------------------


def test_lora_reaches_the_attention_of_the_language_model_and_nothing_else(backbone):
    names = [name for name, _ in backbone.model.named_modules()]
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    hit = [name for name in names if re.fullmatch(backbone.lora_target_regex(projections), name)]
    assert len(hit) == 4 * 4 and all(".language_model.layers." in name for name in hit)
    for other in ("gate_proj", "experts", "gate", "qkv", "proj"):
        assert not [name for name in names if re.fullmatch(backbone.lora_target_regex([other]), name)]
    for name in backbone.projectors.values():
        assert len([module for module in names if module.endswith(name)]) == 1


def test_nf4_takes_the_attention_and_leaves_experts_and_routers(path):
    pytest.importorskip("bitsandbytes")
    model = load_backbone(path, dtype=torch.float32, device="cpu", load_in_4bit=True).model
    linear = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(linear) == 4 * 4 and all(".language_model.layers." in name and ".self_attn." in name for name in linear)
    mlp = model.model.language_model.layers[0].mlp
    assert mlp.gate.weight.dtype == mlp.experts.down_proj.dtype == torch.float32


def test_the_backward_pass_gives_the_gradient_of_plain_autograd(path):
    """Through experts, deepstack and evictions; routing is repeated as it was."""
    backbone = load_backbone(path, dtype=torch.float64, device="cpu")
    backbone.model.requires_grad_(False)
    torch.manual_seed(0)
    targets = backbone.lora_target_regex(["q_proj", "k_proj", "v_proj"])
    others = rf"(?!{targets}$).*"  # without which PEFT would take every module of these names, see below
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, exclude_modules=others, init_lora_weights=False)
    weights = [p for p in PeftModel(backbone.model, config).parameters() if p.requires_grad]
    settings = StreamSettings(chunk_seconds=2, max_seconds=6)
    question, answer = backbone.question_ids(QUESTION)[0], backbone.answer_ids("A toy rabbit.")[0]

    def gradient(chunkwise: bool) -> list[torch.Tensor]:
        cache = CompressedCache(BudgetProfile.uniform(backbone.config, 24), build_selection("omnimem"))
        stream = Stream(backbone, cache)
        flow = ChunkwiseBPTT(stream) if chunkwise else stream
        reader, encoder = settings.open(RABBIT, backbone)
        with torch.no_grad():
            parts = [encoder.prefix(), *(encoder.encode(chunk) for chunk in reader), encoder.closing()]
        assert parts[1].deepstack is not None

        def loss() -> tuple[torch.Tensor]:
            logits, ids = stream.answer_logits(parts[-1], [question], [answer])
            return (torch.nn.functional.cross_entropy(logits, ids),)

        flow.forward(parts[0], **({} if chunkwise else {"text": True}))
        for part in parts[1:-1]:
            flow.step(part)
        for one in weights:
            one.grad = None
        if isinstance(flow, ChunkwiseBPTT):
            flow.add_loss(loss)
            flow.backward(1.0)
        else:
            loss()[0].backward()
        return [one.grad.clone() for one in weights if one.grad is not None]

    plain, ours = gradient(False), gradient(True)
    scale = max(one.abs().max().item() for one in plain)
    assert len(plain) == len(ours) == len(weights) and scale > 1e-3
    # The transformers norms compute in float32 whatever the weights are.
    assert max((a - b).abs().max().item() for a, b in zip(plain, ours, strict=True)) <= 1e-6 * scale


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on tiny, with trained projectors."""
    projectors = "lora.modules_to_save=[visual,deepstack_1,audio_in,audio]"
    options = (
        "model.backbone=qwen3_omni",
        "train.max_steps=4",
        "train.learning_rate=3e-2",
        "train.save_steps=4",
        projectors,
    )
    return trained_run(tmp_path_factory.mktemp("run"), *options)


def test_a_run_adapts_the_attention_of_the_language_model_and_nothing_else(run):
    """For experts PEFT (0.21) turns the regular expression of the targets into bare names, which encoders have too."""
    names = {name for name in load_file(run / "adapter_model.safetensors") if "lora" in name}
    assert len(names) == 2 * 4 * 4 and all(".language_model.layers." in name for name in names)


def test_an_export_is_the_published_layout_with_the_logits_of_base_and_adapter(run, tmp_path, capsys):
    out = tmp_path / "merged"
    assert omnimem(["export", str(run), "--out", str(out)]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    assert set(load_file(out / "model.safetensors")) == set(load_file(run / "base" / "model.safetensors"))
    with quiet_transformers():
        merged, info = Reference.from_pretrained(out, output_loading_info=True)
        processor = Qwen3OmniMoeProcessor.from_pretrained(out)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert processor.tokenizer.decode(processor.tokenizer(QUESTION).input_ids) == QUESTION
    answers = []
    for path in (run, out):
        session = StreamingSession.from_pretrained(path)
        assert session.backbone.name == "qwen3_omni"
        for _ in session.watch(RABBIT):
            pass
        answers.append(session.ask(QUESTION, max_new_tokens=8, min_new_tokens=8))
    assert answers[0] == answers[1] != ""
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain, ours = (model(input_ids=ids).logits for model in (reference_model(run / "base"), merged.eval()))
    assert (plain - ours).abs().max() > 0.1


@pytest.mark.parametrize(
    "override", ["lora.target_modules=[gate_proj]", "lora.target_modules=[experts]", "data.chunk_seconds=3"]
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, override):
    assert main(arguments(tmp_path, "model.backbone=qwen3_omni", override)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert override.split("=")[0].split(".")[1] in line and "qwen3_omni" in line
