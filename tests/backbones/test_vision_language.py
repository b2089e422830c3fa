"""Qwen2.5-VL and Qwen3-VL: streams equal the transformers model on the whole clip; checkpoints load strictly.

The reference is transformers: its processor on the whole clip, `model(...)`, and its position ids where
transformers 5.23 has those the models were trained with.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.video_utils import VideoMetadata

from clips import MEDIA, RABBIT, WEBB
from omnimem import StreamingSession
from omnimem.backbones import Backbone, backbone_class, load_backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.video_salmonn2.positions import MediaTokens, group_position_ids
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.modality import TEXT, VISUAL
from omnimem.stream_settings import StreamSettings
from reference_models import QUESTION, TOLERANCE, Whole, streamed, whole_clip
from small_runs import adapter, trained_run

QWEN2_5, QWEN3 = NAMES = ["qwen2_5_vl", "qwen3_vl"]
STOCK = {QWEN2_5: Qwen2_5_VLForConditionalGeneration, QWEN3: Qwen3VLForConditionalGeneration}
WRAPPED = "<|vision_start|><|video_pad|><|vision_end|>"
JFK = MEDIA / "audio_speech_jfk_11s.flac"

every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: backbone_class(name).build_tiny(folder / name))


@pytest.fixture(scope="module")
def loaded(path_of):
    return cache(lambda name, dtype=torch.float32: load_backbone(path_of(name), dtype=dtype, device="cpu"))


def reference(path: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model, complete."""
    with quiet_transformers():
        model, info = STOCK[name].from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@cache
def clip_of(path: Path, fps: float, **options: Any) -> Whole:
    return whole_clip(path, fps, **options)


# ---- against the transformers model on the whole clip ----------------------------------------------------------------


def reference_inputs(backbone: Backbone, clip: Whole, placeholder: str | None = None) -> Any:
    """What the transformers processor makes of a clip and a question."""
    # In Qwen3-VL every patch brings its own tokens around it.
    placeholder = placeholder or {QWEN2_5: WRAPPED, QWEN3: "<|video_pad|>"}[backbone.name]
    count = len(clip.frames)
    # The video processor of Qwen3-VL shares out a budget of pixels among the frames of a clip.
    shared = count if backbone.name == QWEN3 else 1
    return backbone.processor(
        text=backbone.prompt_prefix + placeholder + backbone.question_turn(QUESTION),
        videos=[clip.video],
        videos_kwargs={
            "fps": clip.fps,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "size": {edge: pixels * shared for edge, pixels in backbone.pixel_limits().size.items()},
            "video_metadata": [VideoMetadata(total_num_frames=count, fps=clip.fps, frames_indices=list(range(count)))],
        },
        return_tensors="pt",
    )


def reference_ids(model: Any, inputs: Any, video_token: int) -> Tensor:
    """Rotary ids ``[3, 1, T]`` by the transformers model."""
    names = ("input_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    given = {name: inputs[name] for name in names if name in inputs}
    kinds = 2 * (inputs["input_ids"] == video_token).int()
    return model.model.get_rope_index(**given, mm_token_type_ids=kinds)[0]


def trained_ids(backbone: Backbone, model: Any, inputs: Any) -> Tensor:
    """The same as the models were trained with: in Qwen2.5-VL text goes on behind the video's largest id."""
    ids = reference_ids(model, inputs, backbone.config.video_token_id)
    if backbone.name == QWEN2_5:
        video = (inputs["input_ids"][0] == backbone.config.video_token_id).nonzero()[:, 0]
        behind = int(video[-1]) + 1
        largest = int(ids[:, 0, video].max())
        ids[:, 0, behind:] = torch.arange(ids.shape[2] - behind) + largest + 1
    return ids


CLIPS = {
    "a clip with audio": (WEBB, 1.0, {"max_seconds": 12}),
    "2 fps, odd length": (RABBIT, 2.0, {"max_seconds": 6.6}),
    "3 fps": (RABBIT, 3.0, {"max_seconds": 4}),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("clip", CLIPS)
@every_model
def test_streaming_equals_reference_prefill(loaded, path_of, name, clip, dtype):
    backbone, model = loaded(name, dtype), reference(path_of(name), name, dtype)
    path, fps, options = CLIPS[clip]
    inputs = reference_inputs(backbone, clip_of(path, fps, audio=False, **options))
    ids = trained_ids(backbone, model, inputs)
    expected = model(**inputs, position_ids=ids).logits
    kinds = torch.where(inputs["input_ids"] == backbone.config.video_token_id, VISUAL, TEXT)
    for chunk_seconds in (2, 4, 20):
        logits, positions, modality = streamed(backbone, path, fps, chunk_seconds, audio=False, **options)
        assert torch.equal(positions, ids) and torch.equal(modality, kinds)
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
    if name == QWEN3:
        assert torch.equal(ids, reference_ids(model, inputs, backbone.config.video_token_id))
        assert (model(**inputs).logits - expected).abs().max() <= TOLERANCE[dtype], "stock all the way"


@torch.no_grad()
@every_model
def test_the_comparison_can_fail(loaded, path_of, name):
    """A single id, and deepstack maps of other layers."""
    backbone, model = loaded(name, torch.float64), reference(path_of(name), name, torch.float64)
    inputs = reference_inputs(backbone, clip_of(RABBIT, 1.0, audio=False, max_seconds=4))
    ids = trained_ids(backbone, model, inputs)
    expected = model(**inputs, position_ids=ids).logits
    ids[1, 0, 40] += 1
    shifted = model(**inputs, position_ids=ids).logits
    assert (shifted - expected)[:, :40].abs().max() <= 1e-12 < 1e-4 < (shifted - expected)[:, 40:].abs().max()
    if name == QWEN3:
        merger = model.model.visual.deepstack_merger_list
        merger[0], merger[1] = merger[1], merger[0]
        assert (model(**inputs).logits - expected).abs().max() > 1e-2


def test_reference_qwen2_5_vl_puts_text_among_the_ids_of_the_video(loaded, path_of):
    """What our ids differ in from transformers 5.23 is what stands behind the video, and nothing else."""
    backbone, model = loaded(QWEN2_5), reference(path_of(QWEN2_5), QWEN2_5)
    inputs = reference_inputs(backbone, clip_of(WEBB, 1.0, audio=False, max_seconds=12))
    theirs, ours = reference_ids(model, inputs, backbone.config.video_token_id), trained_ids(backbone, model, inputs)
    (video,) = (inputs["input_ids"][0] == backbone.config.video_token_id).nonzero(as_tuple=True)
    behind = int(video[-1]) + 1
    assert torch.equal(theirs[..., :behind], ours[..., :behind])
    _, height, width = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    start = int(video[0])
    assert theirs[0, 0, behind] == start + max(height, width) < start + 5 * 4 + 1 == ours[0, 0, behind]


def test_reference_qwen3_vl_keeps_the_tokens_around_the_placeholder(loaded):
    """What our tokens differ in from transformers 5.23 on the published template is one on either side of the video."""
    backbone, clip = loaded(QWEN3), clip_of(WEBB, 1.0, audio=False, max_seconds=12)
    ours, theirs = (
        reference_inputs(backbone, clip, text)["input_ids"][0].tolist() for text in ("<|video_pad|>", WRAPPED)
    )
    first = len(backbone.text_ids(backbone.prompt_prefix)[0])
    last = len(theirs) - len(backbone.question_ids(QUESTION)[0]) - 1
    assert (theirs[first], theirs[last]) == (backbone.vision_start, backbone.vision_end)
    assert [token for i, token in enumerate(theirs) if i not in (first, last)] == ours


@torch.no_grad()
@pytest.mark.parametrize("timestamps", [1, 2, 3])
def test_a_grouped_stream_equals_the_reference_model_at_the_groups_ids(loaded, path_of, timestamps):
    """Times are written before groups of patches; groups go on across chunks."""
    backbone, model = loaded(QWEN3), reference(path_of(QWEN3), QWEN3)
    inputs = reference_inputs(backbone, clip_of(WEBB, 1.0, audio=False, max_seconds=11))
    grid = inputs["video_grid_thw"]
    patches, positions = int(grid[0, 0]), int(grid[0].prod() // 4 // grid[0, 0])
    group = -(-patches // timestamps)
    laid_out = "".join(
        f"<{2 * first + 0.5:.1f} seconds><|vision_start|>"
        + "<|video_pad|>" * (positions * (min(first + group, patches) - first))
        + "<|vision_end|>"
        for first in range(0, patches, group)
    )
    text = backbone.prompt_prefix + laid_out + backbone.question_turn(QUESTION)
    token_ids = backbone.tokenizer(text, return_tensors="pt").input_ids
    ids = group_position_ids(token_ids[0], grid, MediaTokens(backbone.config.video_token_id, -1, 2))[:, None]
    expected = model(
        input_ids=token_ids,
        position_ids=ids,
        pixel_values_videos=inputs["pixel_values_videos"],
        video_grid_thw=grid,
        mm_token_type_ids=2 * (token_ids == backbone.config.video_token_id).int(),
    ).logits
    for chunk_seconds in (2, 6, 20):
        logits, streamed_ids, _ = streamed(
            backbone, WEBB, 1.0, chunk_seconds, {"timestamps": timestamps}, audio=False, max_seconds=11
        )
        assert torch.equal(streamed_ids, ids) and (logits - expected).abs().max() <= 1e-5


# ---- questions -------------------------------------------------------------------------------------------------------


def session_of(backbone: Backbone, mean: int = 4000, **options: Any) -> StreamingSession:
    profile = BudgetProfile.uniform(backbone.config, mean, math.inf)
    return StreamingSession(backbone, profile, settings=StreamSettings(chunk_seconds=4), **options)


@torch.no_grad()
@every_model
def test_an_answer_is_the_reference_models(loaded, path_of, name):
    """Half-way and at the end; Qwen2.5-VL is read again for every token, as transformers has other position ids."""
    backbone, model = loaded(name), reference(path_of(name), name)
    silent = [backbone.config.video_token_id, backbone.config.image_token_id, backbone.config.vision_start_token_id]
    count = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": silent}
    session = session_of(backbone)
    whole = clip_of(RABBIT, 1.0, audio=False, short_side=360)
    for event in session.watch(RABBIT):
        clip = whole if event.last else Whole(whole.frames[: int(event.seconds)], None, 1.0)
        inputs = reference_inputs(backbone, clip)
        length = inputs["input_ids"].shape[1]
        if name == QWEN3:
            tokens = model.generate(**inputs, **count, do_sample=False)[0, length:]
        else:
            tokens, given = [], dict(inputs)
            for _ in range(6):
                logits = model(**given, position_ids=trained_ids(backbone, model, given)).logits[0, -1]
                logits[[*silent, *backbone.end_token_ids]] = -torch.inf
                tokens.append(int(logits.argmax()))
                for key, value in (("input_ids", tokens[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                    if key in given:
                        given[key] = torch.cat((given[key], torch.tensor([[value]])), dim=1)
        answers = [session.ask(QUESTION, **count) for _ in range(2)]
        assert answers == [backbone.tokenizer.decode(tokens, skip_special_tokens=True)] * 2 != ["", ""]


@pytest.mark.parametrize("positions", ["original", "compact"])
@every_model
def test_a_small_memory_holds_visual_tokens_alone(loaded, name, positions):
    session = session_of(loaded(name), 24, position_ids=positions)
    events = list(session.watch(RABBIT))
    assert events[-1].retained["visual"] == 23 and events[-1].retained["audio"] == 0
    assert session.ask(QUESTION, max_new_tokens=4, min_new_tokens=4)
    assert 0 < session.score_answer(QUESTION, "A toy rabbit.") < 20


@every_model
def test_audio_is_neither_processed_nor_asked_for(loaded, name):
    backbone = loaded(name)
    with pytest.raises(OmniMemError, match=f"{name} does not support audio") as error:
        list(session_of(backbone).watch(JFK))
    assert "\n" not in str(error.value)
    with pytest.raises(OmniMemError, match="does not support audio"):
        backbone.stream_encoder(video=False, audio=True, fps=1.0)
    assert backbone.stream_encoder(video=True, audio=True, fps=1.0).has_audio is False
    with pytest.raises(OmniMemError, match="multiple of 2"):
        StreamSettings(chunk_seconds=3).check(backbone)


@torch.no_grad()
@every_model
def test_the_plan_counts_what_a_stream_has(loaded, name):
    backbone = loaded(name)
    settings = StreamSettings(chunk_seconds=4, max_seconds=7)
    reader, encoder = settings.open(RABBIT, backbone)
    encoder.prefix()
    kinds = [encoder.encode(chunk).modality for chunk in reader]
    planned = backbone.tokens_per_chunk(frame_size=(240, 320), audio=True, fps=1.0, seconds=7.0, chunk_seconds=4.0)
    assert planned == [(int((one == VISUAL).sum()), 0) for one in kinds]


# ---- checkpoints -----------------------------------------------------------------------------------------------------

ROOTS = {
    QWEN2_5: r"(visual|model\.(embed_tokens|layers|norm)|lm_head)\.",
    QWEN3: r"(model\.(visual|language_model)|lm_head)\.",
}
LACKING = {
    QWEN2_5: ["visual.blocks.1.attn.qkv.bias", "visual.merger.ln_q.weight", "model.layers.2.mlp.up_proj.weight"],
    QWEN3: ["model.visual.deepstack_merger_list.1.norm.bias", "model.visual.pos_embed.weight", "lm_head.weight"],
}


def changed(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(path, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@every_model
def test_the_tiny_checkpoint_has_the_published_layout(path_of, name):
    assert all(re.match(ROOTS[name], key) for key in load_file(path_of(name) / "model.safetensors"))
    assert json.loads((path_of(name) / "config.json").read_text())["model_type"] == name
    assert load_backbone(path_of(name)).name == name


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in LACKING[name]])
def test_a_weight_that_is_missing_is_named(path_of, tmp_path, name, key):
    broken = changed(path_of(name), tmp_path / "broken", lambda weights: weights.pop(key))
    with pytest.raises(OmniMemError, match=f"1 missing keys: .*{re.escape(key.removeprefix('model.'))}") as error:
        load_backbone(broken, device="cpu")
    assert "\n" not in str(error.value)


@every_model
@pytest.mark.parametrize("key", ["visual.blocks.9.norm1.weight", "audio.q_tokens"])
def test_a_weight_too_many_is_named(path_of, tmp_path, name, key):
    """Among them those of a model that takes audio, whose files call themselves by the same name."""
    more = {("model." if name == QWEN3 else "") + key: torch.zeros(2)}
    with pytest.raises(OmniMemError, match=f"1 unexpected keys: .*{re.escape(key)}"):
        load_backbone(changed(path_of(name), tmp_path / "broken", lambda w: w.update(more)), device="cpu")


@every_model
def test_small_checkpoints_with_tied_embeddings_load(path_of, tmp_path, name):
    """As published for 3B and 4B: no output projection is written."""
    folder = changed(path_of(name), tmp_path / "tied", lambda weights: weights.pop("lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(folder, device="cpu")
    assert backbone.model.lm_head.weight is backbone.language_model.embed_tokens.weight


# ---- training and export ---------------------------------------------------------------------------------------------


@every_model
def test_lora_reaches_the_language_model_and_nothing_else(loaded, name):
    backbone = loaded(name)
    names = [module for module, _ in backbone.model.named_modules()]
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    hit = [module for module in names if re.fullmatch(backbone.lora_target_regex(projections), module)]
    layers = backbone.config.text_config.num_hidden_layers
    assert len(hit) == 7 * layers and all(module.startswith("model.language_model.layers.") for module in hit)
    for other in ("qkv", "proj", "linear_fc1", "mlp"):
        assert not [module for module in names if re.fullmatch(backbone.lora_target_regex([other]), module)]
    for projector in backbone.projectors.values():
        assert sum(module.endswith(projector) for module in names) == 1


@torch.no_grad()
@every_model
def test_a_run_exports_what_the_reference_classes_load(tmp_path, name, capsys):
    """Two steps, with the projector; the audio of the clips is not asked for."""
    options = ("train.max_steps=2", "train.learning_rate=3e-2", "lora.modules_to_save=[visual]", "data.audio=false")
    run = trained_run(tmp_path, f"model.backbone={name}", *options)
    whole = {key for key in adapter(run) if "lora" not in key}
    assert whole and all(".visual.merger." in key for key in whole)
    assert all("language_model.layers" in key for key in set(adapter(run)) - whole)
    assert omnimem(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    keys = [set(load_file(folder / "model.safetensors")) for folder in (run / "base", tmp_path / "merged")]
    assert keys[0] == keys[1], "the hub's layout"
    base, merged = reference(run / "base", name), reference(tmp_path / "merged", name)
    with quiet_transformers():
        assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")) is STOCK[name]
        processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    backbone = load_backbone(tmp_path / "merged", device="cpu")
    assert type(processor) is type(backbone.processor) and backbone.name == name
    clip = clip_of(RABBIT, 1.0, audio=False, max_seconds=4)
    before = reference_inputs(load_backbone(run / "base", device="cpu"), clip)
    backbone.processor = processor
    given = reference_inputs(backbone, clip)
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(given[key])) for key in before)
    plain, logits = base(**given).logits, merged(**given).logits
    adapted = PeftModel.from_pretrained(base, str(run)).eval()(**given).logits
    assert (logits - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert (logits - plain).abs().max() > 0.1
