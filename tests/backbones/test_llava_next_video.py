"""LLaVA-NeXT-Video: streams equal the transformers model; prompts equal the chat template of the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import LlavaNextVideoForConditionalGeneration

from clips import MEDIA, RABBIT, WEBB
from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.llava_next_video.backbone import LlavaNextVideo
from omnimem.backbones.llava_next_video.tiny import build_tiny
from omnimem.backbones.published import PUBLISHED, build_on_meta
from omnimem.budget import ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.modality import VISUAL
from reference_models import QUESTION, TOLERANCE, streamed, whole_clip
from rope_1d import (
    LONG,
    check_answer_by_hand,
    check_answer_of_reference,
    check_strict_loading,
    check_trained_run,
    following,
    session_of,
)

PER_FRAME = 9
JFK = MEDIA / "audio_speech_jfk_11s.flac"

VICUNA = f"USER: <video>\n{QUESTION} ASSISTANT:"
MISTRAL = f"[INST] <video>\n{QUESTION} [/INST]"
CHATML = f"<|im_start|>user\n<video>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
"""Prompts of the published 7B and 7B-DPO, 7B-32K, 34B and 34B-DPO."""

MEDIA_THEN_TEXT = (
    "{% for part in messages[0].content if part.type == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
)
TEMPLATES = {
    MISTRAL: "{{ '[INST] ' }}" + MEDIA_THEN_TEXT + "{{ ' [/INST]' }}",
    CHATML: "{{ '<|im_start|>user\n' }}" + MEDIA_THEN_TEXT + "{{ '<|im_end|>\n<|im_start|>assistant\n' }}",
}


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


def reference_inputs(backbone: Backbone, prompt: str, clip: Path, fps: float, **options: Any) -> Any:
    """What the transformers processor makes of clip and prompt, which is what the published template writes."""
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = backbone.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt
    return backbone.processor(text=text, videos=[whole_clip(clip, fps, **options).video], return_tensors="pt")


@torch.no_grad()
def check_equality(
    backbone: Backbone, path: Path, dtype: torch.dtype, prompt: str, clip: Path, fps: float, **options: Any
) -> None:
    inputs = reference_inputs(backbone, prompt, clip, fps, **options)
    expected = LlavaNextVideoForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()(**inputs).logits
    seen = inputs["input_ids"] == backbone.processor.video_token_id
    for chunk_seconds in (1, 3, 20):
        logits, positions, modality = streamed(backbone, clip, fps, chunk_seconds, **options)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
        assert torch.equal(modality == VISUAL, seen)
        # Ids of visual tokens say where in the frame a token is.
        assert torch.equal(positions[0], torch.arange(seen.shape[1])[None])
        assert (positions[1:] == positions[0])[:, ~seen].all()
        places = positions[1:, seen].view(2, -1, PER_FRAME)
        assert torch.equal(places, torch.cartesian_prod(torch.arange(3), torch.arange(3)).T[:, None].expand_as(places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("clip", "fps", "options"),
    [(WEBB, 1.0, {}), (RABBIT, 2.0, {"max_seconds": 5.3})],
    ids=["1fps", "2fps-odd-length"],
)
def test_streaming_equals_reference_prefill(llava, llava64, path, clip, fps, options, dtype):
    backbone = llava if dtype == torch.float32 else llava64
    check_equality(backbone, path, dtype, VICUNA, clip, fps, **options)


@pytest.mark.parametrize("prompt", [MISTRAL, CHATML], ids=["mistral", "chatml"])
def test_other_published_decoders_and_turns(tmp_path, prompt):
    folder = build_tiny(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    if prompt == MISTRAL:
        config["text_config"].update(model_type="mistral", sliding_window=None, head_dim=16)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATES[prompt])
    backbone = load_backbone(folder, dtype=torch.float64, device="cpu")
    assert backbone.config.text_config.model_type == ("mistral" if prompt == MISTRAL else "llama")
    check_equality(backbone, folder, torch.float64, prompt, WEBB, 1.0, max_seconds=3)


def test_an_answer_is_that_of_reference_generate_when_everything_is_kept(llava64, path):
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(path, dtype=torch.float64).eval()
    check_answer_of_reference(llava64, model, reference_inputs(llava64, VICUNA, WEBB, 1.0, max_seconds=12))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["omnimem", "hermes", "streammem"])
def test_an_answer_is_the_greedy_one_at_the_memorys_own_ids(llava64, method, positions):
    check_answer_by_hand(llava64, method, positions)


@torch.no_grad()
def test_the_plan_counts_what_a_stream_has_and_a_chunk_encodes_no_more(llava):
    seen: list[int] = []
    handle = llava.model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    reader, encoder = LONG.open(WEBB, llava)
    opening = encoder.prefix()
    inputs = [encoder.encode(chunk) for chunk in reader]
    handle.remove()
    assert seen == [3] * 4
    planned = llava.tokens_per_chunk(frame_size=(9, 16), audio=True, fps=1.0, seconds=12.0, chunk_seconds=3.0)
    assert planned == [(len(one), 0) for one in inputs] == [(3 * PER_FRAME, 0)] * 4
    assert inputs[1].time[0, ::PER_FRAME].tolist() == [3.0, 4.0, 5.0]
    assert len(encoder.closing()) == 0
    assert int(encoder.closing().next_position_id) == len(opening) + 12 * PER_FRAME


# ---- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_turns_are_the_ids_of_the_whole_prompt(path, scheme):
    """Where a tokenizer puts a space before every piece (the legacy one of Llama 2) and where only before the first."""
    backbone: Any = load_backbone(path, dtype=torch.float32, device="cpu")
    tokenizer = backbone.tokenizer
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    video, answer = backbone.processor.video_token_id, "A red flower, é."
    for question in (QUESTION, "  Where?\nThere", "1"):
        whole = tokenizer(f"USER: <video>\n{question} ASSISTANT: {answer}").input_ids
        turns = [*backbone.prompt_prefix_ids[0].tolist(), video, *backbone.question_ids(question)[0].tolist()]
        assert [*turns, *backbone.answer_ids(answer)[0].tolist()] == [*whole, tokenizer.eos_token_id]
        assert turns.count(tokenizer.bos_token_id) == 1 and turns[0] == tokenizer.bos_token_id
    assert tokenizer.decode(backbone.answer_ids(f" {answer}\n")[0], skip_special_tokens=True) == answer
    assert tokenizer.bos_token_id not in backbone.text_ids(QUESTION)
    assert backbone.end_token_ids == sorted((tokenizer.eos_token_id, tokenizer.pad_token_id))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("USER: {{ messages[0].content[1].text }} ASSISTANT:", "does not contain <video>"),
        ("USER: {{ messages[0].content[1].text }} <video> ASSISTANT:", "does not put the video before the question"),
    ],
)
def test_a_template_that_cannot_be_streamed_is_refused(path, template, problem):
    backbone = load_backbone(path, dtype=torch.float32, device="cpu")
    backbone.processor.chat_template = template
    with pytest.raises(OmniMemError, match=problem):
        LlavaNextVideo(backbone.model, backbone.processor, "here")
    backbone.processor.chat_template = None
    with pytest.raises(OmniMemError, match="here: the processor has no chat template"):
        LlavaNextVideo(backbone.model, backbone.processor, "here")


# ---- limits, checkpoint, training ------------------------------------------------------------------------------------


def test_reindexed_position_ids_stay_in_the_trained_range(path):
    """The limit is lowered to 60 ids, six frames; at the published 4,096 it is 28 frames of 144."""
    backbone: Any = load_backbone(path, dtype=torch.float32, device="cpu")
    backbone.config.text_config.max_position_embeddings = 60
    for positions, last in (("original", 12 * PER_FRAME), ("compact", 8)):
        session = session_of(backbone, mean=12, position_ids=positions)
        list(session.watch(WEBB))
        assert following(session.cache) == backbone.prompt_prefix_ids.shape[1] + last


def test_audio_alone_and_smaller_frames_are_refused(llava):
    with pytest.raises(OmniMemError, match="no video, and llava_next_video does not support audio"):
        list(session_of(llava).watch(JFK))
    with pytest.raises(OmniMemError, match="84×84"):
        llava.stream_encoder(video=True, audio=False, fps=1.0, max_pixels=83**2)
    assert llava.stream_encoder(video=True, audio=True, fps=1.0).has_audio is False


def test_a_weight_that_is_missing_or_unknown_is_named(path, tmp_path):
    roots = {name.split(".")[0] for name in load_file(path / "model.safetensors")}
    assert roots == {"language_model", "vision_tower", "multi_modal_projector", "image_newline"}
    check_strict_loading(path, tmp_path, "image_newline", "vision_tower.vision_model.head.probe")


def test_what_training_and_plans_ask_for(llava, path):
    names = [name for name, _ in llava.model.named_modules()]
    found = [name for name in names if re.fullmatch(llava.lora_target_regex(["q_proj", "down_proj"]), name)]
    assert len(found) == 3 * 2 and all(name.startswith("model.language_model.layers.") for name in found)
    assert sum(name.endswith(llava.projectors["visual"]) for name in names) == 1
    assert all(any(name.startswith(whole) for name in names) for whole in llava.skip_quantization_modules)
    assert llava.supports_audio is False
    assert ModelFingerprint.of(llava.config) == ModelFingerprint("llama", 3, 4, 16)
    assert load_backbone(path, device="meta").language_model.dtype == torch.bfloat16


def test_the_published_7b_is_planned_without_its_files():
    name = "llava-hf/LLaVA-NeXT-Video-7B-hf"
    backbone = build_on_meta(name, LlavaNextVideo, torch.bfloat16)
    assert PUBLISHED[name][0] == backbone.name
    assert sum(weight.numel() for weight in backbone.model.parameters()) == pytest.approx(7.06e9, rel=1e-3)
    counts = backbone.tokens_per_chunk(frame_size=(9, 16), audio=False, fps=1.0, seconds=5.0, chunk_seconds=4.0)
    assert counts == [(4 * 144, 0), (144, 0)]


def test_a_trained_run_exports_what_the_reference_classes_load(tmp_path):
    check_trained_run(tmp_path, LlavaNextVideo, "<video>", "train.per_device_train_batch_size=2")
