"""LLaVA-OneVision (1-D RoPE): streams equal the transformers model; checkpoints load strictly."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration, Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from clips import MEDIA, RABBIT, WEBB
from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.llava_onevision.backbone import LlavaOnevision
from omnimem.backbones.llava_onevision.tiny import build_tiny
from omnimem.budget import ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.memory.rotary import Rotary
from omnimem.modality import TEXT, VISUAL
from omnimem.stream_settings import StreamSettings
from reference_models import QUESTION, TOLERANCE, streamed, whole_clip
from rope_1d import LONG, check_answer_by_hand, check_strict_loading, check_trained_run, following, session_of

JFK = MEDIA / "audio_speech_jfk_11s.flac"
PER_FRAME = 9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def llava(path: Path) -> Backbone:
    return load_backbone(path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def llava64(path: Path) -> Backbone:
    return load_backbone(path, dtype=torch.float64, device="cpu")


# ---- equality --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_prefill(
    path: Path, dtype: torch.dtype, backbone: Backbone, clip: Path, fps: float, **options: Any
) -> Any:
    """Reference logits ``[1, T, V]`` and token ids of clip and prompt, from the transformers processor."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = backbone.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == f"<|im_start|>user <video>\n{QUESTION}<|im_end|><|im_start|>assistant\n"
    inputs = backbone.processor(text=text, videos=[whole_clip(clip, fps, **options).video], return_tensors="pt")
    return model(**inputs).logits, inputs["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("clip", "fps", "options"),
    [(WEBB, 1.0, {}), (RABBIT, 2.0, {"max_seconds": 5.3})],
    ids=["1fps", "2fps-odd-length"],
)
def test_streaming_equals_reference_prefill(llava, llava64, path, clip, fps, options, dtype):
    backbone = llava if dtype == torch.float32 else llava64
    expected, ids = reference_prefill(path, dtype, backbone, clip, fps, **options)
    for chunk_seconds in (1, 3, 20):
        logits, positions, modality = streamed(backbone, clip, fps, chunk_seconds, **options)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
        # Ids of visual tokens say where in the frame a token is; all of the video but the newline is visual.
        assert torch.equal(positions[0], torch.arange(ids.shape[1])[None])
        seen = modality == VISUAL
        assert int(seen.sum()) == int((ids == backbone.config.video_token_id).sum()) - 1
        assert (positions[1:] == positions[0])[:, ~seen].all()
        places = positions[1:, seen].view(2, -1, PER_FRAME)
        assert torch.equal(places, torch.cartesian_prod(torch.arange(3), torch.arange(3)).T[:, None].expand_as(places))


@torch.no_grad()
def test_the_plan_counts_what_a_stream_has(llava):
    reader, encoder = LONG.open(WEBB, llava)
    opening = encoder.prefix()
    inputs = [encoder.encode(chunk) for chunk in reader]
    planned = llava.tokens_per_chunk(frame_size=(9, 16), audio=True, fps=1.0, seconds=12.0, chunk_seconds=3.0)
    assert planned == [(len(one), 0) for one in inputs] == [(3 * PER_FRAME, 0)] * 4
    assert llava.tokens_per_chunk(frame_size=None, audio=True, fps=1.0, seconds=2.0, chunk_seconds=1.0) == [(0, 0)] * 2
    assert inputs[1].time[0, ::PER_FRAME].tolist() == [3.0, 4.0, 5.0]
    closing = encoder.closing()
    assert torch.equal(closing.embeds[0, 0], llava.model.model.image_newline)
    assert closing.modality.tolist() == [[TEXT]]
    assert int(closing.next_position_id) == len(opening) + 12 * PER_FRAME + 1
    assert torch.equal(encoder.closing().position_ids, closing.position_ids), "closing moves nothing on"


# ---- one rotary axis -------------------------------------------------------------------------------------------------


def test_keys_are_rotated_as_a_decoder_with_one_axis_rotates_them():
    config = Qwen2Config(
        vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    embedding = Qwen2Model(config).rotary_emb
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 40, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 100_000, (2, 40, 3), generator=generator)
    _, expected = apply_rotary_pos_emb(states, states, *embedding(states, ids[..., 0]))
    rotary = Rotary(embedding)
    assert (rotary.rotate(states, ids) - expected).abs().max() <= 1e-15
    assert (rotary.unrotate(expected, ids) - states).abs().max() <= 1e-12


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["omnimem", "hermes", "infinipot_v"])
def test_an_answer_is_the_greedy_one_at_the_memorys_own_ids(llava64, method, positions):
    check_answer_by_hand(llava64, method, positions)


def test_original_ids_leave_the_trained_range_and_say_so_and_reindexed_ones_stay(path, caplog):
    """The limit is lowered to 60 ids, six frames; at the published 32,768 it is 167 frames of 196."""
    backbone = load_backbone(path, dtype=torch.float32, device="cpu")
    backbone.config.text_config.max_position_embeddings = 60
    ends = {}
    for positions in ("original", "compact"):
        caplog.clear()
        session = session_of(backbone, mean=12, position_ids=positions)
        prefix = len(session.settings.open(WEBB, backbone)[1].prefix())
        with caplog.at_level(logging.WARNING):
            ends[positions] = [following(session.cache) for _ in session.watch(WEBB)]
        assert positions == "compact" or sum("trained range" in record.message for record in caplog.records) == 1
    assert ends["original"] == [prefix + 3 * PER_FRAME * (number + 1) for number in range(4)]
    # Eight of the twelve are the budget of visual tokens; a memory that is full stays where it is.
    assert ends["compact"] == [prefix + 8] * 4


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_audio_alone_is_refused_and_beside_video_ignored(llava):
    with pytest.raises(OmniMemError, match="no video, and llava_onevision does not support audio") as refused:
        list(session_of(llava).watch(JFK))
    assert "\n" not in str(refused.value)
    assert llava.stream_encoder(video=True, audio=True, fps=1.0).has_audio is False


def test_frames_cannot_be_made_smaller_and_chunks_hold_whole_frames(llava):
    with pytest.raises(OmniMemError, match="70×70"):
        llava.stream_encoder(video=True, audio=False, fps=1.0, max_pixels=69**2)
    llava.stream_encoder(video=True, audio=False, fps=1.0, max_pixels=70**2)
    with pytest.raises(OmniMemError, match=r"multiple of 0\.5"):
        StreamSettings(fps=2.0, chunk_seconds=0.75).check(llava)


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_missing_or_unknown_is_named(path, tmp_path):
    weights = load_file(path / "model.safetensors")
    roots = {name.split(".")[0] for name in weights}
    assert roots == {"language_model", "vision_tower", "multi_modal_projector", "image_newline"}
    check_strict_loading(path, tmp_path, "image_newline", "vision_tower.vision_model.head.probe")


def test_what_training_and_plans_ask_for(llava, path):
    names = [name for name, _ in llava.model.named_modules()]
    found = [name for name in names if re.fullmatch(llava.lora_target_regex(["q_proj", "down_proj"]), name)]
    assert len(found) == 3 * 2 and all(name.startswith("model.language_model.layers.") for name in found)
    assert sum(name.endswith(llava.projectors["visual"]) for name in names) == 1
    assert all(any(name.startswith(whole) for name in names) for whole in llava.skip_quantization_modules)
    assert ModelFingerprint.of(llava.config) == ModelFingerprint("qwen2", 3, 2, 16)
    assert load_backbone(path, device="meta").language_model.dtype == torch.bfloat16


def test_a_trained_run_exports_what_the_reference_classes_load(tmp_path):
    """The audio of the clips is not asked for."""
    check_trained_run(tmp_path, LlavaOnevision, "<video>")


def test_small_checkpoints_with_tied_embeddings_load(tmp_path):
    """As published for 0.5B: the text configuration ties them, and no head is written."""
    folder = build_tiny(tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_backbone(folder, device="cpu")
    assert loaded.model.lm_head.weight is loaded.language_model.embed_tokens.weight
