"""video-SALMONN 2+, both families: published layouts load whole, streams equal whole prompts, position ids are theirs.

What the authors' code computed is in `golden_models` (see `check_golden_models`); the reference for streams of real
clips is our own model on the whole prompt, as our processor lays it out.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import check_golden_models
from clips import MEDIA, RABBIT, ROOT
from omnimem import StreamingSession
from omnimem.backbones import BACKBONES, Backbone, ChunkInputs, backbone_class, load_backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.mel import MelStream
from omnimem.backbones.video_salmonn2.configuration import (
    VideoSalmonn2Config,
    VideoSalmonn2Qwen2_5Config,
)
from omnimem.backbones.video_salmonn2.positions import MediaTokens, group_position_ids, span_position_ids
from omnimem.backbones.vision import FramePatches
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.measure.meter import repeat
from omnimem.media import Chunk, open_media
from omnimem.memory import CompressedCache
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.recipe import load_recipe
from omnimem.selection import build_selection
from omnimem.selection.full import Full
from omnimem.stream_settings import StreamSettings
from reference_models import QUESTION, TOLERANCE, Whole, whole_clip
from small_runs import adapter, arguments, main, trained_run
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import tokenize_row
from train.setup import add_lora, budget_profile, selection_method, stream_settings

FAMILIES = ["video_salmonn2", "video_salmonn2_qwen2_5"]
QWEN3, QWEN2_5 = FAMILIES
APOLLO = MEDIA / "speech_apollo15_hammer_feather_47s.webm"
COMMENTARY = MEDIA / "audio_speech_commentary_mono16k_7s.mp3"
GOLDEN = sorted((ROOT / "tests" / "data" / "golden_models").glob("*.safetensors"))
RATE = 16_000
NOTHING = np.zeros(0, np.float32)

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda family: backbone_class(family).build_tiny(folder / family))


@pytest.fixture(scope="module")
def loaded(path_of):
    return cache(lambda family, dtype=torch.float32: load_backbone(path_of(family), dtype=dtype, device="cpu"))


# ---- checkpoints -----------------------------------------------------------------------------------------------------

ROOTS = {
    QWEN3: r"model\.(visual|audio|language_model)\.|lm_head\.",
    QWEN2_5: r"(visual|audio|model\.(embed_tokens|layers|norm)|lm_head)\.",
}
AUDIO_KEYS = [
    "audio.conv1.weight",
    "audio.embed_positions.weight",
    "audio.layers.1.self_attn.q_proj.weight",
    "audio.layer_norm.bias",
    "audio.q_tokens",
    "audio.audio_proj.bias",
    "audio.qformer.bert.embeddings.LayerNorm.weight",
    "audio.qformer.bert.encoder.layer.1.attention.self.query.weight",
    "audio.qformer.bert.encoder.layer.0.crossattention.self.key.bias",
    "audio.qformer.bert.encoder.layer.0.crossattention.output.LayerNorm.bias",
    "audio.qformer.bert.encoder.layer.0.intermediate_query.dense.weight",
    "audio.qformer.bert.encoder.layer.0.output_query.LayerNorm.weight",
]


def root(family: str) -> str:
    return "model." if family == QWEN3 else ""


def changed(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(path, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def state(path: Path, **options: Any) -> dict[str, Tensor]:
    return load_backbone(path, dtype=torch.float32, device="cpu", **options).model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_family
def test_the_tiny_checkpoint_has_the_published_layout_and_every_weight_of_it_is_used(path_of, family):
    weights = load_file(path_of(family) / "model.safetensors")
    assert {root(family) + name for name in AUDIO_KEYS} <= set(weights)
    assert all(re.match(ROOTS[family], name) for name in weights)
    config = json.loads((path_of(family) / "config.json").read_text())
    assert config["model_type"] == {QWEN3: "qwen3_vl", QWEN2_5: "qwen2_5_vl"}[family]
    assert ("text_config" in config) == (family == QWEN3) and "qformer_config" in config["audio_config"]
    loaded = state(path_of(family))
    left = list(loaded.values())
    for name, weight in weights.items():
        found = [i for i, other in enumerate(left) if other.shape == weight.shape and torch.equal(other, weight)]
        assert found, name
        left.pop(found[0])
    assert not left


LACKING = [*AUDIO_KEYS, "visual.patch_embed.proj.weight", "visual.merger.{merger}.weight"]


@every_family
@pytest.mark.parametrize("name", LACKING)
def test_a_weight_that_is_missing_is_named(path_of, tmp_path, family, name):
    name = root(family) + name.format(merger="norm" if family == QWEN3 else "ln_q")
    broken = changed(path_of(family), tmp_path / "broken", lambda weights: weights.pop(name))
    ours = {"embeddings.LayerNorm": "layernorm", "attention.self": "attention.attention"}
    ending = name.split("bert.")[-1].split("audio.")[-1].split("visual.")[-1]
    for there, here in ours.items():
        ending = ending.replace(there, here)
    with pytest.raises(OmniMemError, match=f"1 missing keys: .*{re.escape(ending)}") as error:
        load_backbone(broken, device="cpu")
    assert "\n" not in str(error.value)


@every_family
@pytest.mark.parametrize(
    "name",
    [
        "audio.qformer.bert.encoder.layer.2.output.dense.weight",
        "audio.layers.7.fc1.weight",
        "audio.ln_audio.weight",
        "visual.blocks.9.norm1.weight",
        "qformer.bert.pooler.weight",
        "audio.position_ids",
    ],
)
def test_a_weight_too_many_is_named(path_of, tmp_path, family, name):
    more = {root(family) + name: torch.zeros(2)}
    ending = name.split("bert.")[-1].split("audio.")[-1]
    with pytest.raises(OmniMemError, match=f"1 unexpected keys: .*{re.escape(ending)}") as error:
        load_backbone(changed(path_of(family), tmp_path / "broken", lambda w: w.update(more)), device="cpu")
    assert "\n" not in str(error.value)


@every_family
def test_a_weight_of_another_shape_is_refused(path_of, tmp_path, family):
    other = {f"{root(family)}audio.q_tokens": torch.zeros(1, 1, 40)}
    with pytest.raises(OmniMemError, match=r"1 mismatched keys.*q_tokens"):
        load_backbone(changed(path_of(family), tmp_path / "broken", lambda w: w.update(other)), device="cpu")


@every_family
def test_buffers_of_the_published_q_former_hold_nothing(path_of, tmp_path, family):
    more = {f"{root(family)}audio.qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    path = changed(path_of(family), tmp_path / "whole", lambda weights: weights.update(more))
    assert same(state(path), state(path_of(family)))


def sharded(path: Path, target: Path) -> Path:
    """The same checkpoint in three files and their index."""
    shutil.copytree(path, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    places = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        part = {name: weights[name] for name, place in places.items() if place == file}
        save_file(part, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


@every_family
def test_a_checkpoint_in_several_files_loads(path_of, tmp_path, family):
    path = sharded(path_of(family), tmp_path / "sharded")
    assert same(state(path), state(path_of(family)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = f"{root(family)}audio.q_tokens"
    file = path / index["weight_map"].pop(name)
    part = load_file(file)
    part.pop(name)
    save_file(part, file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OmniMemError, match=r"1 missing keys: .*q_tokens"):
        load_backbone(path, device="cpu")


def prompt(backbone: Backbone, clip: Whole, patches_per_group: int = 1) -> Any:
    """What our processor makes of a whole clip and a question."""
    placeholder, media = "<|audio_pad|>", {}
    if len(clip.frames):
        placeholder = "<|video_pad|>"
        # The video processor of the Qwen3-VL family shares out a budget of pixels among the frames of a clip.
        shared = len(clip.frames) if backbone.name == QWEN3 else 1
        size = {name: pixels * shared for name, pixels in backbone.pixel_limits().size.items()}
        media = {"frames": clip.video, "fps": clip.fps, "size": size, "patches_per_group": patches_per_group}
    text = f"{backbone.prompt_prefix}<|vision_start|>{placeholder}<|vision_end|>{backbone.question_turn(QUESTION)}"
    return backbone.processor(text, audio=clip.audio, **media)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_a_checkpoint_saved_again_has_the_published_names_and_loads_everywhere(
    loaded, path_of, tmp_path, family, shard
):
    backbone = loaded(family)
    with quiet_transformers():
        backbone.model.save_pretrained(tmp_path, max_shard_size=shard)
        backbone.processor.save_pretrained(tmp_path)
        auto = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        processor = AutoProcessor.from_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "100KB")
    assert set().union(*map(load_file, files)) == set(load_file(path_of(family) / "model.safetensors"))
    ours = load_backbone(tmp_path, device="cpu")
    assert type(ours) is type(backbone) and type(auto) is type(backbone.model)
    assert type(processor) is type(backbone.processor)
    clip = clip_of(RABBIT, 1.0, max_seconds=3)
    given, again = prompt(backbone, clip), prompt(SimpleNamespace(**{**parts(backbone), "processor": processor}), clip)
    assert given.keys() == again.keys() and all(torch.equal(given[name], again[name]) for name in given)
    expected = backbone.model(**given).logits
    assert torch.equal(auto(**given).logits, expected) and torch.equal(ours.model(**given).logits, expected)
    silent = {name: value for name, value in given.items() if name != "input_features"}
    assert not torch.allclose(expected, backbone.model(**silent).logits), "the audio has an effect"


def parts(backbone: Backbone) -> dict[str, Any]:
    names = ("name", "prompt_prefix", "question_turn", "pixel_limits")
    return {name: getattr(backbone, name) for name in names}


# ---- whose checkpoint it is ------------------------------------------------------------------------------------------

HEARS = {"audio_config": {"d_model": 1280, "qformer_config": {"model_type": "bert", "encoder_width": 1280}}}
CONFIGS = {
    "7B as published": ({"model_type": "qwen2_5_vl", "hidden_size": 3584, **HEARS}, QWEN2_5),
    "7B, nothing said of its audio": ({"model_type": "qwen2_5_vl", "audio_config": {"model_type": "whisper"}}, QWEN2_5),
    "8B as published": ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}, **HEARS}, QWEN3),
    "7B saved again": (
        {"model_type": "video_salmonn2_qwen2_5", "text_config": {"model_type": "qwen2_5_vl_text"}, **HEARS},
        QWEN2_5,
    ),
    "8B saved again": ({"model_type": "video_salmonn2", "text_config": {"model_type": "qwen3_vl_text"}}, QWEN3),
    "Qwen2.5-VL": ({"model_type": "qwen2_5_vl", "hidden_size": 3584}, "qwen2_5_vl"),
    "Qwen2.5-VL, nested": ({"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 8}}, "qwen2_5_vl"),
    "Qwen2.5-VL, no audio": ({"model_type": "qwen2_5_vl", "audio_config": None}, "qwen2_5_vl"),
    "Qwen3-VL": ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "qwen3_vl"),
    "Qwen2.5-Omni": ({"model_type": "qwen2_5_omni", "thinker_config": {"audio_config": {}}}, "qwen2_5_omni"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_says_whose_checkpoint_it_is(name):
    config, expected = CONFIGS[name]
    assert next(backbone for backbone in BACKBONES if backbone_class(backbone).matches_config(config)) == expected


@every_family
def test_a_checkpoint_loads_as_its_own_family_and_as_no_other(path_of, family):
    other = next(name for name in FAMILIES if name != family)
    assert {load_backbone(path_of(family), backbone=name, device="cpu").name for name in (None, family)} == {family}
    with pytest.raises(OmniMemError, match=f"model.backbone={other} contradicts .* a checkpoint of {family};"):
        load_backbone(path_of(family), backbone=other, device="cpu")


# ---- streams equal whole prompts -------------------------------------------------------------------------------------


@cache
def clip_of(path: Path, fps: float, **options: Any) -> Whole:
    return whole_clip(path, fps, **options)


def cut(clip: Whole, seconds: float) -> list[Chunk]:
    """A clip in memory, cut into chunks."""
    samples = 0 if clip.audio is None else len(clip.audio)
    length = max(len(clip.frames) / clip.fps, samples / RATE)
    chunks = []
    for index in range(max(1, int(-(-length // seconds)))):
        t0, t1 = index * seconds, min((index + 1) * seconds, length)
        first, stop = round(t0 * clip.fps), round((index + 1) * seconds * clip.fps)
        frames = clip.frames[first:stop]
        audio = None if clip.audio is None else clip.audio[int(t0 * RATE) : int((index + 1) * seconds * RATE)]
        times = np.arange(first, first + len(frames)) / clip.fps
        last = (index + 1) * seconds >= length
        chunks.append(Chunk(index, t0, t1, frames, times, audio, NOTHING, NOTHING, last))
    return chunks


@torch.no_grad()
def stream(backbone: Backbone, clip: Whole, chunk_seconds: float, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids ``[3, 1, T]`` and modality of a stream and a question, with a memory that keeps everything."""
    chunks = cut(clip, chunk_seconds)
    encoder = backbone.stream_encoder(
        video=len(clip.frames) > 0,
        audio=clip.audio is not None,
        fps=clip.fps,
        **{"duration": len(clip.frames) / clip.fps, **options},
    )
    memory = CompressedCache(BudgetProfile.uniform(backbone.config, 4000, 1.0), build_selection("omnimem"))
    flow = Stream(backbone, memory)
    hidden = [flow.forward(encoder.prefix(), text=True)]
    for chunk in chunks:
        inputs = encoder.encode(chunk)
        if len(inputs):
            hidden.append(flow.forward(inputs))
            memory.compress()
    closing = encoder.closing()
    hidden.append(flow.forward(closing, text=True))
    question = ChunkInputs.text(backbone.embed(backbone.question_ids(QUESTION)), closing.next_position_id)
    hidden.append(flow.forward(question, text=True))
    kept = memory.token_metadata(0)
    return backbone.lm_head(torch.cat(hidden, dim=1)), kept.position_ids.permute(2, 0, 1), kept.modality


@torch.no_grad()
def whole(backbone: Backbone, clip: Whole, group: int = 1, layout: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    """The same from the model on the whole prompt."""
    given = prompt(backbone, clip, group)
    names = ("input_ids", "video_grid_thw", "second_per_grid_ts")
    ids, _ = backbone.model.model.get_rope_index(
        **{name: given[name] for name in names if name in given}, position_layout=layout
    )
    kinds = torch.full_like(given["input_ids"], TEXT)
    kinds[given["input_ids"] == backbone.config.video_token_id] = VISUAL
    kinds[given["input_ids"] == backbone.config.audio_token_id] = AUDIO
    return backbone.model(**given, position_layout=layout).logits, ids, kinds


CLIPS = {
    "with audio": (1.0, 35, 35.0, (30, 60)),
    "2 fps, odd": (2.0, 63, 31.3, (30, 60)),
    "audio ends long before": (1.0, 64, 7.0, (30, 60, 90)),
    "audio ends where a chunk does": (1.0, 45, 30.0, (30, 60)),
    "audio goes on": (1.0, 7, 47.0, (30, 60)),
    "no audio": (1.0, 9, None, (2, 6, 20)),
    "audio alone": (1.0, 0, 44.0, (30, 60)),
}


def apollo(name: str) -> tuple[Whole, tuple[float, ...]]:
    fps, frames, seconds, lengths = CLIPS[name]
    clip = clip_of(APOLLO, fps, short_side=120)
    assert clip.audio is not None
    pictures = np.concatenate((clip.frames, clip.frames[::-1]))[:frames]
    return Whole(pictures, None if seconds is None else clip.audio[: int(seconds * RATE)], fps), lengths


LAYOUTS = [
    *((QWEN3, name, None) for name in CLIPS),
    *((QWEN3, name, 3) for name in ("with audio", "audio ends long before", "audio goes on", "no audio")),
    *((QWEN2_5, name, "train") for name in CLIPS),
    *((QWEN2_5, name, "release") for name in ("with audio", "2 fps, odd", "audio ends long before", "audio goes on")),
]


@pytest.mark.parametrize(("family", "name", "layout"), LAYOUTS)
def test_a_stream_equals_the_whole_prompt(loaded, family, name, layout):
    clip, lengths = apollo(name)
    if family == QWEN3:
        patches = -(-len(clip.frames) // 2)
        options, of_whole = {"timestamps": layout}, {"group": -(-patches // (layout or max(1, patches))) or 1}
    else:
        options, of_whole = {"position_layout": layout}, {"layout": layout}
    # Double precision is slow, and says the same of every clip: it is asked of some.
    for dtype in (torch.float32, torch.float64) if name in ("with audio", "no audio") else (torch.float32,):
        backbone = loaded(family, dtype)
        expected, ids, kinds = whole(backbone, clip, **of_whole)
        for chunk_seconds in lengths:
            logits, streamed_ids, modality = stream(backbone, clip, chunk_seconds, **options)
            assert torch.equal(modality, kinds) and torch.equal(streamed_ids, ids)
            assert (logits - expected).abs().max() <= TOLERANCE[dtype]


def test_a_clip_from_a_file_is_the_same_stream(loaded):
    """Decoded chunk by chunk, with the audio of another file beside the frames."""
    settings = StreamSettings(chunk_seconds=30, timestamps=None)
    for sound in (None, COMMENTARY):
        clip = clip_of(APOLLO, 1.0, short_side=360, audio_path=sound)
        _, ids, _ = whole(loaded(QWEN3), clip)
        session = StreamingSession(
            loaded(QWEN3), BudgetProfile.uniform(loaded(QWEN3).config, 4000, 1.0), "full", settings
        )
        reader, encoder = settings.open(APOLLO, session.backbone, sound)
        with torch.no_grad():
            parts = [encoder.prefix(), *map(encoder.encode, reader), encoder.closing()]
        positions = torch.cat([part.position_ids for part in parts], dim=2)
        assert len(parts) == 4 and torch.equal(positions, ids[..., : positions.shape[2]])


def test_the_double_precision_comparison_can_fail(loaded):
    """The transformers norms round to single precision, which hides what is below; a single id is not hidden."""
    backbone, (clip, _) = loaded(QWEN2_5, torch.float64), apollo("no audio")
    given = prompt(backbone, clip)
    expected, ids, _ = whole(backbone, clip)
    ids[0, 0, -1] += 1
    with torch.no_grad():
        shifted = backbone.model(**given, position_ids=ids).logits
    assert (shifted - expected)[:, :-1].abs().max() <= 1e-12 < 1e-3 < (shifted - expected)[:, -1].abs().max()


# ---- what the authors' code computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_released_code(path):
    assert check_golden_models.failures(check_golden_models.compare(path)) == []


def test_the_golden_comparison_can_fail(tmp_path):
    """One weight a little off, one id off, the ids of another layout."""
    path = next(path for path in GOLDEN if "qwen25" in path.stem)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    failures = {}
    for what in ("weight", "id", "layout"):
        other = dict(tensors)
        if what == "weight":
            other["weights.audio.audio_proj.weight"] = tensors["weights.audio.audio_proj.weight"] * 1.001
        elif what == "id":
            other["outputs.position_ids.train"] = tensors["outputs.position_ids.train"].clone()
            other["outputs.position_ids.train"][0, 0, 9] += 1
        else:
            for name in ("position_ids", "logits"):
                other[f"outputs.{name}.release"] = tensors[f"outputs.{name}.train"].clone()
        save_file(other, tmp_path / what, metadata=metadata)
        failures[what] = check_golden_models.failures(check_golden_models.compare(tmp_path / what))
    assert failures["weight"][0] == "audio embeddings" and "logits.train" in failures["weight"]
    assert failures["id"] and all(name.startswith("position ids.train") for name in failures["id"])
    assert {"position ids.release", "logits.release"} <= set(failures["layout"])
    assert not any(".train" in name for name in failures["layout"])


# ---- position ids by hand --------------------------------------------------------------------------------------------

V, A, T = 1, 2, 3
TOKENS = MediaTokens(video=V, audio=A, merge=2)
PATCH = [V] * 6
"""Frames of 2 × 3 visual tokens."""


def patch(time: int, corner: int) -> list[tuple[int, int, int]]:
    """Position ids of the six visual tokens of a frame, row after row; height and width count from `corner`."""
    top = [(time, corner, corner), (time, corner, corner + 1), (time, corner, corner + 2)]
    return [*top, *((t, h + 1, w) for t, h, w in top)]


def text(*ids: int) -> list[tuple[int, int, int]]:
    return [(i, i, i) for i in ids]


def heard(first: int, count: int, height: int) -> list[tuple[int, int, int]]:
    """Position ids of audio tokens beside frames in the Qwen2.5-VL family."""
    return [(i, height, i) for i in range(first, first + count)]


SPANS = {
    # Two patches of two seconds: four ids and four audio tokens each. The span begins at 2.
    "audio as long": (
        [T, T, *PATCH, *[A] * 4, *PATCH, *[A] * 4, T, T],
        [2],
        [*text(0, 1), *patch(2, 2), *heard(2, 4, 2), *patch(6, 2), *heard(6, 4, 2), *text(10, 11)],
    ),
    "audio longer": (
        [T, T, *PATCH, *[A] * 4, *PATCH, *[A] * 7, T, T],
        [2],
        [*text(0, 1), *patch(2, 2), *heard(2, 4, 2), *patch(6, 2), *heard(6, 7, 2), *text(13, 14)],
    ),
    "audio shorter": (
        [T, T, *PATCH, *[A] * 3, *PATCH, T, T],
        [2],
        [*text(0, 1), *patch(2, 2), *heard(2, 3, 2), *patch(6, 2), *text(7, 8)],
    ),
    "silent": ([T, T, *PATCH, *PATCH, T], [2], [*text(0, 1), *patch(2, 2), *patch(6, 2), *text(7)]),
    # Without audio text goes on behind the largest id, which is a column; with audio behind the largest time.
    "one patch, silent": ([T, *PATCH, T], [1], [*text(0), *patch(1, 1), *text(4)]),
    "one patch, little audio": ([T, *PATCH, A, A, T], [1], [*text(0), *patch(1, 1), *heard(1, 2, 1), *text(3)]),
    "audio only": ([T, T, *[A] * 3, T], [], text(0, 1, 2, 3, 4, 5)),
    "text only": ([T, T], [], text(0, 1)),
}
TWO = [T, *PATCH, A, A, *PATCH, A, A, T, *PATCH, A, T]
"""Two videos: of two patches, and of one."""

RELEASED = {
    # Twelve positions get the ids of two patches, whatever they are; what follows is text.
    "audio as long": [*text(0, 1), *patch(2, 2), *patch(6, 2), *text(7, 8, 9, 10, 11, 12, 13, 14), *text(15, 16)],
    "audio longer": [*text(0, 1), *patch(2, 2), *patch(6, 2), *text(*range(7, 20))],
    "audio shorter": [*text(0, 1), *patch(2, 2), *patch(6, 2), *text(7, 8, 9, 10, 11)],
    "silent": SPANS["silent"][2],
    "one patch, silent": SPANS["one patch, silent"][2],
    "audio only": SPANS["audio only"][2],
}


def ids_of(function, tokens: list[int], patches: list[int], *args: Any) -> list[tuple[int, ...]]:
    grids = torch.tensor([[count, 4, 6] for count in patches], dtype=torch.int64).view(-1, 3)
    return [tuple(row) for row in function(torch.tensor(tokens), grids, *args).T.tolist()]


def span(tokens: list[int], patches: list[int], layout: str = "train") -> list[tuple[int, ...]]:
    return ids_of(span_position_ids, tokens, patches, torch.full((len(patches),), 4.0), TOKENS, layout)


@pytest.mark.parametrize("name", SPANS)
def test_golden_ids_of_a_span(name):
    tokens, patches, expected = SPANS[name]
    assert span(tokens, patches) == expected


@pytest.mark.parametrize("name", RELEASED)
def test_golden_ids_of_the_released_code(name):
    tokens, patches, _ = SPANS[name]
    assert span(tokens, patches, "release") == RELEASED[name]


def test_golden_ids_of_two_videos():
    first = [*text(0), *patch(1, 1), *heard(1, 2, 1), *patch(5, 1), *heard(3, 2, 1)]
    assert span(TWO, [2, 1]) == [*first, *text(6), *patch(7, 7), *heard(7, 1, 7), *text(8)]
    # Text between videos stands behind all ids of the one before, only the last text behind its times.
    tokens = [*PATCH, A, T, *PATCH, A, T]
    assert span(tokens, [1, 1]) == [*patch(0, 0), *heard(0, 1, 0), *text(3), *patch(4, 4), *heard(4, 1, 4), *text(5)]
    # The released code takes up the second video where the first twelve positions end, inside the first one.
    assert span(TWO, [2, 1], "release") == [*text(0), *patch(1, 1), *patch(5, 1), *patch(6, 6), *text(*range(9, 16))]


@pytest.mark.parametrize(
    ("tokens", "patches", "layout"),
    [
        ([T, *PATCH, T], [1, 1], "train"),
        ([T, *PATCH, T], [2], "train"),
        ([T, *PATCH, A, T], [], "train"),
        ([T, *PATCH, T], [1, 1], "release"),
    ],
)
def test_videos_and_grids_that_do_not_match_are_one_line(tokens, patches, layout):
    with pytest.raises(OmniMemError, match="video"):
        span(tokens, patches, layout)


GROUPS = {
    "per patch": (
        [T, *PATCH, A, A, T, T, *PATCH, A, A, T],
        [2],
        [*text(0), *patch(1, 1), *text(4, 5), *text(6, 7), *patch(8, 8), *text(11, 12), *text(13)],
    ),
    "audio longer": (
        [T, *PATCH, A, A, T, *PATCH, *[A] * 5, T],
        [2],
        [*text(0), *patch(1, 1), *text(4, 5, 6), *patch(7, 7), *text(10, 11, 12, 13, 14, 15)],
    ),
    "audio shorter": (
        [T, *PATCH, A, T, *PATCH, T],
        [2],
        [*text(0), *patch(1, 1), *text(4, 5), *patch(6, 6), *text(9)],
    ),
    # A group's patches count on in time from where it begins.
    "grouped": (
        [T, *PATCH, *PATCH, *PATCH, A, A, T, *PATCH, *PATCH, A, T],
        [5],
        [*text(0), *patch(1, 1), *patch(2, 1), *patch(3, 1), *text(4, 5, 6), *patch(7, 7), *patch(8, 7), *text(10, 11)],
    ),
    "long group": (
        [T, *PATCH * 5, T],
        [5],
        [*text(0), *patch(1, 1), *patch(2, 1), *patch(3, 1), *patch(4, 1), *patch(5, 1), *text(6)],
    ),
    "two videos": (
        [T, *PATCH, A, T, *PATCH, T, *PATCH, *PATCH, A, T],
        [2, 2],
        [*text(0), *patch(1, 1), *text(4, 5), *patch(6, 6), *text(9), *patch(10, 10), *patch(11, 10), *text(13, 14)],
    ),
    "audio only": ([T, A, A, T], [], text(0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_golden_ids_of_groups(name):
    tokens, patches, expected = GROUPS[name]
    assert ids_of(group_position_ids, tokens, patches, TOKENS) == expected


@pytest.mark.parametrize(
    ("tokens", "patches"), [([T, *PATCH, T], []), ([V] * 5, [1]), (PATCH * 2, [1]), (PATCH, [1, 1])]
)
def test_groups_that_do_not_fit_the_grid_are_one_line(tokens, patches):
    with pytest.raises(OmniMemError, match="video"):
        ids_of(group_position_ids, tokens, patches, TOKENS)


class AudioEncoder:
    """As many tokens as there are samples."""

    tokens_per_second = 2.0

    def __call__(self, chunk: Chunk) -> Tensor:
        assert chunk.audio is not None
        return torch.zeros(len(chunk.audio), 64)


@pytest.fixture
def by_hand(loaded, monkeypatch):
    """Ids and kinds of a stream: frames of 2 × 3 tokens, every text one token, two seconds a patch."""

    def run(family: str, patches: int, sounds: int | None, patches_a_chunk: int, **options: Any):
        backbone = loaded(family)
        for module in ("qwen2_5_vl", "qwen3_vl"):
            monkeypatch.setattr(
                f"omnimem.backbones.{module}.stream_encoder.encode_frames",
                lambda _, frames, __: FramePatches(torch.zeros(len(frames) // 2, 6, 64), None, 2, 3),
            )
        monkeypatch.setattr(backbone, "text_ids", lambda _: torch.zeros(1, 1, dtype=torch.int64))
        encoder = backbone.stream_encoder(
            video=patches > 0, audio=sounds is not None, fps=1.0, duration=2.0 * patches, **options
        )
        if sounds is not None:
            encoder.audio_encoder, encoder.alignment = AudioEncoder(), 2.0
        done = [encoder.prefix()]
        seconds = 2 * patches_a_chunk
        length = max(2 * patches, -(-(sounds or 0) // 2))
        for index in range(-(-length // seconds)):
            start, stop = index * seconds, min((index + 1) * seconds, length)
            frames = np.zeros((max(0, min(stop, 2 * patches) - start), 1, 1, 3), np.uint8)
            audio = None if sounds is None else np.zeros(max(0, min(2 * stop, sounds) - 2 * start), np.float32)
            times = np.arange(start, start + len(frames), dtype=float)
            chunk = Chunk(index, start, stop, frames, times, audio, NOTHING, NOTHING, stop == length)
            done.append(encoder.encode(chunk))
        done.append(encoder.closing())
        positions = torch.cat([part.position_ids[:, 0] for part in done], dim=1)
        kinds = torch.cat([part.modality[0] for part in done]).tolist()
        following = int(done[-1].next_position_id)
        return [tuple(row) for row in positions.T.tolist()] + text(following), kinds

    return run


def mixed(*runs: tuple[int, int]) -> list[int]:
    return [kind for kind, count in runs for _ in range(count)]


@pytest.mark.parametrize("patches_a_chunk", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "sounds", "kinds"),
    [
        ("audio as long", 8, mixed((TEXT, 2), (VISUAL, 6), (AUDIO, 4), (VISUAL, 6), (AUDIO, 4), (TEXT, 1))),
        ("audio longer", 11, mixed((TEXT, 2), (VISUAL, 6), (AUDIO, 4), (VISUAL, 6), (AUDIO, 7), (TEXT, 1))),
        ("audio shorter", 3, mixed((TEXT, 2), (VISUAL, 6), (AUDIO, 3), (VISUAL, 6), (TEXT, 1))),
    ],
)
@pytest.mark.parametrize("layout", ["train", "release"])
def test_golden_ids_of_a_streamed_span(by_hand, name, sounds, kinds, layout, patches_a_chunk):
    expected = SPANS[name][2] if layout == "train" else RELEASED[name]
    assert by_hand(QWEN2_5, 2, sounds, patches_a_chunk, position_layout=layout) == (expected, kinds)


def test_golden_ids_of_streams_with_video_or_audio_alone(by_hand):
    assert by_hand(QWEN2_5, 1, 2, 1)[0] == [*text(0, 1), *patch(2, 2), *heard(2, 2, 2), *text(4, 5)]
    assert by_hand(QWEN2_5, 1, None, 1)[0] == [*text(0, 1), *patch(2, 2), *text(5, 6)]
    assert by_hand(QWEN2_5, 0, 4, 1)[0] == text(*range(8))
    assert by_hand(QWEN3, 0, 4, 1)[0] == text(*range(8))
    assert by_hand(QWEN3, 1, None, 1)[0] == [*text(0, 1, 2), *patch(3, 3), *text(6, 7)]


STREAMED_GROUPS = {
    # Opening, time, start; a patch; its four audio tokens; end, time, start; and so on.
    ("per patch", 2, 8, None): (
        [*text(0, 1, 2), *patch(3, 3), *text(6, 7, 8, 9), *text(10, 11, 12), *patch(13, 13), *text(16, 17, 18, 19)],
        20,
    ),
    ("audio longer", 2, 10, None): (
        [*text(0, 1, 2), *patch(3, 3), *text(6, 7, 8, 9), *text(10, 11, 12), *patch(13, 13), *text(*range(16, 22))],
        22,
    ),
    ("audio shorter", 2, 3, None): (
        [*text(0, 1, 2), *patch(3, 3), *text(6, 7, 8), *text(9, 10, 11), *patch(12, 12)],
        15,
    ),
    # Three patches in groups of two: the audio of both stands behind the second.
    ("grouped", 3, 12, 2): (
        [
            *text(0, 1, 2), *patch(3, 3), *patch(4, 3), *text(*range(6, 14)),
            *text(14, 15, 16), *patch(17, 17), *text(20, 21, 22, 23),
        ],
        24,
    ),
    ("grouped, audio ends early", 4, 5, 2): (
        [*text(0, 1, 2), *patch(3, 3), *patch(4, 3), *text(*range(6, 14)), *patch(14, 14), *patch(15, 14)],
        17,
    ),
    ("one group, audio goes on", 3, 15, 1): (
        [*text(0, 1, 2), *patch(3, 3), *patch(4, 3), *patch(5, 3), *text(*range(6, 21))],
        21,
    ),
}  # fmt: skip


@pytest.mark.parametrize("patches_a_chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("case", STREAMED_GROUPS, ids=lambda case: case[0])
def test_golden_ids_of_streamed_groups(by_hand, case, patches_a_chunk):
    (_, patches, sounds, timestamps), (expected, end) = case, STREAMED_GROUPS[case]
    positions, kinds = by_hand(QWEN3, patches, sounds, patches_a_chunk, timestamps=timestamps)
    assert positions == [*expected, *text(end, end + 1)]
    assert kinds.count(AUDIO) == sounds and kinds.count(VISUAL) == 6 * patches


# ---- questions -------------------------------------------------------------------------------------------------------


def not_said(backbone: Backbone) -> list[int]:
    """Tokens that stand for media, which a random model may well come to say, and those that end an answer."""
    return [backbone.config.video_token_id, backbone.config.audio_token_id, *backbone.end_token_ids]


@torch.no_grad()
def greedy(backbone: Backbone, given: Any, count: int, layout: str) -> list[int]:
    """Tokens that the model on the whole prompt, read again for each of them, finds likeliest."""
    given = dict(given)
    tokens = []
    for _ in range(count):
        logits = backbone.model(**given, position_layout=layout).logits[0, -1]
        logits[not_said(backbone)] = -torch.inf
        tokens.append(int(logits.argmax()))
        for name, more in (("input_ids", tokens[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            given[name] = torch.cat((given[name], torch.tensor([[more]])), dim=1)
    return tokens


@pytest.mark.parametrize(
    ("family", "settings", "group"),
    [(QWEN2_5, {}, 1), (QWEN2_5, {"position_layout": "release"}, 1), (QWEN3, {}, 1), (QWEN3, {"timestamps": 6}, 4)],
    ids=["train", "release", "a patch", "a group open across chunks"],
)
def test_an_answer_is_the_greedy_one_of_the_whole_prompt(loaded, family, settings, group):
    """Also half-way: then the prompt is what has been streamed. Audio that waits for its group is included."""
    backbone, layout = loaded(family), settings.get("position_layout", "train")
    session = StreamingSession(
        backbone,
        BudgetProfile.uniform(backbone.config, 4000, 1.0),
        settings=StreamSettings(chunk_seconds=30, short_side=120, **settings),
    )
    clip = clip_of(APOLLO, 1.0, short_side=120)
    assert clip.audio is not None
    count = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": not_said(backbone)}
    for event in session.watch(APOLLO):
        seen = Whole(clip.frames[: int(event.seconds)], clip.audio[: int(event.seconds * RATE)], 1.0)
        if event.last:
            seen = clip
        elif layout == "release":
            continue  # the released code counts the patches of the whole clip
        if group > 1 and not event.last:
            assert session._encoder is not None and len(session._encoder.pending_audio) == 12
        given = prompt(backbone, seen, group)
        expected = greedy(backbone, given, 6, layout)
        answers = [session.ask(QUESTION, **count) for _ in range(2)]
        assert answers == [backbone.tokenizer.decode(expected, skip_special_tokens=True)] * 2 != ["", ""]
    produced = backbone.model.generate(**given, **count, position_layout=layout, do_sample=False)
    assert produced[0, -6:].tolist() == expected


@every_family
def test_a_small_memory_holds_visual_and_audio_tokens(loaded, family):
    backbone = loaded(family)
    settings = StreamSettings(chunk_seconds=30, short_side=120)
    session = StreamingSession(backbone, BudgetProfile.uniform(backbone.config, 40), settings=settings)
    events = list(session.watch(APOLLO))
    assert events[-1].retained["visual"] == 33 and events[-1].retained["audio"] == 7
    assert session.ask("What is heard?", max_new_tokens=4, min_new_tokens=4)
    assert 0 < session.score_answer("What is heard?", "A hammer.") < 20


@every_family
def test_the_plan_counts_what_a_stream_has(loaded, family):
    backbone = loaded(family)
    for name in ("with audio", "2 fps, odd", "no audio", "audio alone"):
        clip, _ = apollo(name)
        encoder = backbone.stream_encoder(video=len(clip.frames) > 0, audio=clip.audio is not None, fps=clip.fps)
        encoder.prefix()
        with torch.no_grad():
            kinds = [encoder.encode(chunk).modality for chunk in cut(clip, 30)]
        frame = clip.frames.shape[1:3] if len(clip.frames) else None
        seconds = max(len(clip.frames) / clip.fps, 0 if clip.audio is None else len(clip.audio) / RATE)
        planned = backbone.tokens_per_chunk(
            frame_size=frame, audio=clip.audio is not None, fps=clip.fps, seconds=seconds, chunk_seconds=30.0
        )
        assert planned == [(int((one == VISUAL).sum()), int((one == AUDIO).sum())) for one in kinds]


def test_the_released_layout_needs_a_duration(loaded):
    with pytest.raises(OmniMemError, match="position_layout=release") as error:
        loaded(QWEN2_5).stream_encoder(video=True, audio=True, fps=1.0, position_layout="release")
    assert "\n" not in str(error.value)
    for media in ({"video": True, "audio": False}, {"video": False, "audio": True}):
        assert loaded(QWEN2_5).stream_encoder(**media, fps=1.0, position_layout="release").expected_patches is None


@every_family
def test_chunks_hold_whole_segments_of_thirty_seconds(loaded, family):
    backbone = loaded(family)
    assert [backbone.chunk_alignment(fps) for fps in (1, 0.3, 0.25)] == [30, 60, 120]
    assert backbone.chunk_alignment(1.0, audio=False) == 2
    with pytest.raises(OmniMemError, match="multiple of 30"):
        StreamSettings(chunk_seconds=10).check(backbone)
    StreamSettings(chunk_seconds=10, audio=False).check(backbone)


# ---- long streams ----------------------------------------------------------------------------------------------------

LONG = {
    "qwen2_5_omni": (25, 20_000),
    "qwen3_omni": (13, 12_000),
    QWEN2_5: (2, 2_000),
    QWEN3: (2, 262_144),
    "qwen2_5_vl": (0, 2_000),
    "qwen3_vl": (0, 262_144),
}
"""Position ids a second of audio, and a trained range that a stream of 20 minutes would leave without a time scale."""


def skip_towers(backbone: Backbone, monkeypatch) -> None:
    """Layout and position ids do not depend on what the encoders compute."""
    width = backbone.config.get_text_config().hidden_size
    layers = 3 if backbone.spatial_ids_advance or backbone.name == "qwen3_omni" else 0

    def see(_, frames, __):
        count = -(-len(frames) // 2)
        return FramePatches(
            torch.zeros(count, 6, width), torch.zeros(layers, count, 6, width) if layers else None, 2, 3
        )

    for name in ("qwen2_5_omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl"):
        monkeypatch.setattr(f"omnimem.backbones.{name}.stream_encoder.encode_frames", see)
    if backbone.name in FAMILIES:
        module = "omnimem.backbones.video_salmonn2.backbone.log_mel_segments"
        monkeypatch.setattr(module, lambda _, audio: torch.zeros(-(-len(audio) // (30 * RATE)), 128, 1))
        monkeypatch.setattr(backbone.model.model, "get_audio_features", lambda mel: torch.zeros(len(mel), 60, width))
    elif backbone.supports_audio:
        monkeypatch.setattr(MelStream, "_block", lambda self, signal, start, stop: torch.zeros(128, stop - start))
        per_second = LONG[backbone.name][0]
        monkeypatch.setattr(
            backbone.model.model.audio_tower,
            "forward",
            lambda mel, **_: SimpleNamespace(last_hidden_state=torch.zeros(mel.shape[1] // 100 * per_second, width)),
        )


def held_bytes(thing: Any, model: Backbone) -> int:
    """Bytes of all arrays that can be reached from something, whole storages of views, the model left out."""
    sizes, seen, waiting = 0, {id(model)}, [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            sizes += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen.add(storage.data_ptr())
        elif isinstance(one, np.ndarray):
            sizes += one.nbytes if one.base is None else one.base.nbytes
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        elif hasattr(one, "__dict__"):
            waiting.append(vars(one))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("name", LONG)
def test_twenty_minutes_are_neither_cut_nor_kept(loaded, monkeypatch, name):
    """A real clip over and over. Where ids follow the clock the time scale keeps them in range."""
    backbone, (per_second, limit) = loaded(name), LONG[name]
    skip_towers(backbone, monkeypatch)
    monkeypatch.setattr(backbone.config.get_text_config(), "max_position_embeddings", limit)
    reader = open_media(APOLLO, fps=1.0, chunk_seconds=30, short_side=60, audio=backbone.supports_audio)
    encoder = backbone.stream_encoder(video=True, audio=backbone.supports_audio, fps=1.0, duration=1200.0)
    encoder.prefix()
    heard = seen = largest = 0
    held = {}
    for chunk in repeat(reader, 1.0, 30.0, 1200.0):
        inputs = encoder.encode(chunk)
        kinds = inputs.modality[0]
        heard, seen = heard + int((kinds == AUDIO).sum()), seen + int((kinds == VISUAL).sum())
        largest = max(largest, int(inputs.position_ids.max()), int(inputs.next_position_id))
        assert inputs.deepstack is None or inputs.deepstack.shape[2] == len(inputs)
        held[chunk.t1] = held_bytes(encoder, backbone)
        del inputs
    assert (heard, seen) == (1200 * per_second, 600 * 6)
    assert largest + 512 < limit, "room for a question and its answer"
    assert held[120.0] == held[1200.0] < 2**20
    if limit < 262_144:
        assert limit - 2048 < largest and encoder.time_scale < 1


@torch.no_grad()
@pytest.mark.parametrize("name", [QWEN3, "qwen3_vl"])
def test_the_text_between_frames_is_bounded(loaded, monkeypatch, name):
    backbone = loaded(name)
    skip_towers(backbone, monkeypatch)
    reader = open_media(APOLLO, fps=1.0, chunk_seconds=30, short_side=60, audio=backbone.supports_audio)
    chunks = list(repeat(reader, 1.0, 30.0, 600.0))

    def texts(timestamps: int | None, duration: float | None) -> tuple[int, int, int]:
        encoder = backbone.stream_encoder(
            video=True, audio=backbone.supports_audio, fps=1.0, duration=duration, timestamps=timestamps
        )
        parts = [*map(encoder.encode, chunks), encoder.closing()]
        kinds = torch.cat([part.modality[0] for part in parts])
        starts = sum(int((backbone.embed(torch.tensor([[backbone.vision_start]]))[0] == part.embeds).all(-1).sum())
                     for part in parts)  # fmt: skip
        return starts, int((kinds == TEXT).sum()), int((kinds == AUDIO).sum())

    sound = 1200 if backbone.supports_audio else 0
    each, all_texts, heard = texts(None, 600.0)
    assert (each, heard) == (300, sound)
    assert texts(16, None) == texts(300, 600.0) == (each, all_texts, heard)
    for timestamps, groups in ((16, 16), (256, 150), (1, 1), (7, 7)):
        starts, few, heard = texts(timestamps, 600.0)
        assert (starts, heard) == (groups, sound) and starts <= timestamps
        assert few < all_texts * 1.1 * groups / 300 + 20


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QWEN3, QWEN2_5, "qwen3_vl", "qwen2_5_vl"])
def test_two_clips_side_by_side_are_each_alone(loaded, tmp_path, name):
    """Five seconds without, and eight with audio; where it has them with deepstack maps."""
    backbone = loaded(name, torch.float64)
    recipe = load_recipe(arguments(tmp_path, f"model.backbone={name}", "data.chunk_seconds=30"))
    settings, method = stream_settings(recipe), selection_method(recipe)
    profile = budget_profile(recipe, backbone, method, settings)
    objective = StreamObjective(backbone, backbone.model, profile, method, settings)
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data).rows]
    alone = [objective([sample]) for sample in samples]
    both = objective(samples)
    assert (both.loss - sum(one.loss for one in alone)).abs() <= 1e-9
    assert (both.answer_tokens, both.tokens) == tuple(
        sum(getattr(one, name) for one in alone) for name in ("answer_tokens", "tokens")
    )
    opened = [settings.open(sample.row.media, backbone) for sample in samples]
    with torch.no_grad():
        inputs = [encoder.encode(next(iter(reader))) for reader, encoder in opened if encoder.prefix()]
        batch = ChunkInputs.batch(inputs)
        hidden = [Stream(backbone, CompressedCache(profile, Full())).forward(one) for one in (*inputs, batch)]
    assert (batch.deepstack is not None) == backbone.spatial_ids_advance and len(inputs[0]) != len(inputs[1])
    for i, one in enumerate(inputs):
        assert (hidden[-1][i, : len(one)] - hidden[i][0]).abs().max() <= 1e-12
        assert torch.equal(batch.row(i).embeds, one.embeds) and torch.equal(batch.row(i).position_ids, one.position_ids)


# ---- training and export ---------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@every_family
def test_lora_reaches_the_language_model_and_nothing_else(loaded, family):
    backbone = loaded(family)
    names = [name for name, _ in backbone.model.named_modules()]
    hit = [name for name in names if re.fullmatch(backbone.lora_target_regex(PROJECTIONS), name)]
    assert len(hit) == 4 * 7 and all(name.startswith("model.language_model.layers.") for name in hit)
    in_encoders = [name for name in names if name.endswith("q_proj") and name not in hit]
    assert in_encoders, "the audio encoder has modules of the same names"
    for other in ("query", "key", "dense", "audio_proj", "fc1", "qkv"):
        assert not [name for name in names if re.fullmatch(backbone.lora_target_regex([other]), name)]
    for name in backbone.projectors.values():
        assert sum(module.endswith(name) for module in names) == 1


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Finished runs that have trained what stands between the audio encoder and the language model."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("data.chunk_seconds=30", "train.max_steps=2", "train.learning_rate=3e-2", "train.save_steps=2")

    def run(family: str, *more: str) -> Path:
        return trained_run(folder, f"model.backbone={family}", *options, *more, out=f"{family}-{len(more)}")

    return cache(run)


def base_name(name: str) -> str:
    """Name in the model of a weight in an adapter."""
    return name.removeprefix("base_model.model.")


@every_family
def test_a_run_without_projectors_saves_adapters_of_the_language_model_alone(run_of, family):
    saved = adapter(run_of(family, "train.max_steps=1", "train.save_steps=1"))
    assert len(saved) == 2 * 4 * 4 and all("language_model.layers" in name and "lora" in name for name in saved)


@every_family
def test_the_trained_projector_is_saved_whole_and_restored(run_of, family):
    run = run_of(family, "lora.modules_to_save=[audio]")
    base, saved = state(run / "base"), adapter(run)
    connector = {base_name(name): value for name, value in saved.items() if "lora" not in name}
    assert set(connector) == {name for name in base if "audio.connector" in name}
    moved = {
        name.split("connector.")[1].split(".")[0] for name in connector if not torch.equal(connector[name], base[name])
    }
    assert moved == {"q_tokens", "qformer", "audio_proj"}
    session = StreamingSession.from_pretrained(run)
    restored = session.backbone.model.state_dict()
    for name, value in connector.items():
        assert torch.equal(restored[name.replace("connector.", "connector.modules_to_save.default.")], value)
    for name, value in base.items():
        if "audio.encoder" in name or "visual" in name:
            assert torch.equal(restored[name], value)


@torch.no_grad()
@every_family
def test_an_export_has_the_published_names_and_the_logits_of_base_and_adapter(run_of, tmp_path, capsys, family):
    run, out = run_of(family, "lora.modules_to_save=[audio]"), tmp_path / "merged"
    assert omnimem(["export", str(run), "--out", str(out)]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    assert set(load_file(out / "model.safetensors")) == set(load_file(run / "base" / "model.safetensors"))
    with quiet_transformers():
        merged, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(out)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert processor.tokenizer.decode(processor.tokenizer(QUESTION).input_ids) == QUESTION
    backbone = load_backbone(run / "base", dtype=torch.float32, device="cpu")
    given = prompt(backbone, clip_of(RABBIT, 1.0, short_side=120))
    plain = backbone.model(**given).logits
    adapted = PeftModel.from_pretrained(backbone.model, str(run)).eval()(**given).logits
    logits = merged.eval()(**given).logits
    assert (logits - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert (logits - plain).abs().max() > 0.1
    answers = []
    for path in (run, out):
        session = StreamingSession.from_pretrained(path)
        assert type(session.backbone) is type(backbone)
        for _ in session.watch(RABBIT):
            pass
        answers.append(session.ask(QUESTION, max_new_tokens=6, min_new_tokens=6))
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("family", "timestamps"),
    [(QWEN3, 4), *(pytest.param(one, 256, marks=pytest.mark.long) for one in (QWEN2_5, QWEN3))],
)
def test_gradients_with_trained_projectors_are_those_of_plain_autograd(tmp_path, family, timestamps):
    """Two chunks; in the backward pass each is encoded again."""
    rows = [{"media": APOLLO.name, "questions": [{"question": "What is heard?", "answer": "A hammer."}]}]
    options = ("data.chunk_seconds=30", "data.fps=0.6", f"data.timestamps={timestamps}", "model.dtype=float64")
    recipe = load_recipe(
        arguments(tmp_path, f"model.backbone={family}", "lora.modules_to_save=[visual,audio]", *options, rows=rows)
    )
    backbone = load_backbone("tiny", backbone=family, dtype="float64", device="cpu")
    backbone.model.requires_grad_(False)
    method, settings = selection_method(recipe), stream_settings(recipe)
    profile = budget_profile(recipe, backbone, method, settings)
    model = add_lora(recipe, backbone)
    model.train()
    sample = tokenize_row(load_rows(recipe.data).rows[0], backbone)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    flow = Stream(backbone, CompressedCache(profile, method))
    reader, encoder = settings.open(sample.row.media, backbone)
    flow.forward(encoder.prefix(), text=True)
    for chunk in reader:
        flow.step(encoder.encode(chunk))
    (asked,) = sample.questions
    logits, targets = flow.answer_logits(encoder.closing(), [asked.question], [asked.answer])
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    StreamObjective(backbone, model, profile, method, settings, train_encoders=True)([sample]).backward(1.0)
    for part in ("visual.merger", "q_tokens", "audio_proj", "qformer", "lora_B"):
        names = [name for name in expected if part in name]
        scale = max(expected[name].abs().max().item() for name in names)
        assert scale > 0, part
        for name in names:
            grad = trained[name].grad
            assert grad is not None and (grad - expected[name]).abs().max() <= 1e-6 * scale, name


@every_family
def test_an_unknown_projector_is_one_line(tmp_path, capsys, family):
    overrides = (f"model.backbone={family}", "lora.modules_to_save=[qformer]", "data.chunk_seconds=30")
    assert main(arguments(tmp_path, *overrides)) == 2
    error = capsys.readouterr().err
    assert re.search("lora.modules_to_save: 'qformer' must be one of visual, (.*, )?audio", error)
    assert error.count("\n") == 1


def test_what_a_published_file_leaves_out_is_what_the_published_code_takes():
    """Files omit defaults of the published classes, which differ from those of transformers."""
    config = VideoSalmonn2Qwen2_5Config(vision_config={}, audio_config={"model_type": "whisper"})
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.rms_norm_eps) == (
        3584,
        28,
        4,
        1e-6,
    )
    assert (vision.hidden_size, vision.depth, vision.tokens_per_second) == (1280, 32, 2)
    assert (audio.d_model, audio.encoder_layers, audio.num_mel_bins, audio.output_dim) == (1280, 32, 128, 3584)
    qformer = audio.qformer_config
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.encoder_hidden_size) == (3072, 2, 1280)
    again = VideoSalmonn2Qwen2_5Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert VideoSalmonn2Config().audio_config.output_dim == VideoSalmonn2Config().text_config.hidden_size
