"""VideoLLaMA 3: streams equal the transformers model, dropped tokens included, for any chunk length."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoLlama3ForConditionalGeneration
from transformers.video_utils import VideoMetadata

from clips import MEDIA, RABBIT, WEBB
from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.published import PUBLISHED, build_on_meta
from omnimem.backbones.video_llama_3.backbone import VideoLlama3
from omnimem.backbones.video_llama_3.tiny import MAX_FRAMES, build_tiny
from omnimem.budget import ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
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

JFK = MEDIA / "audio_speech_jfk_11s.flac"
TIMECODE = MEDIA / "speech_burned_in_timecode_42s.mp4"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llama(path: Path) -> Backbone:
    return load_backbone(path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def llama64(path: Path) -> Backbone:
    return load_backbone(path, dtype=torch.float64, device="cpu")


# ---- equality --------------------------------------------------------------------------------------------------------


def reference_inputs(backbone: Backbone, clip: Path, fps: float, **options: Any) -> Any:
    """What the transformers processor makes of clip and prompt, which is what the published template writes."""
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = backbone.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == f"<|im_start|>user\n<|video_pad|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    video = whole_clip(clip, fps, **options).video
    when = VideoMetadata(total_num_frames=len(video), fps=fps, frames_indices=list(range(len(video))))
    # The processor shrinks frames of clips longer than the trained maximum; give it more pixels for those.
    size = dict(backbone.processor.video_processor.size)
    size["longest_edge"] = size["longest_edge"] // MAX_FRAMES * max(MAX_FRAMES, len(video))
    return backbone.processor(text=text, videos=[video], video_metadata=[when], size=size, return_tensors="pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("clip", "fps", "options"),
    [(WEBB, 1.0, {}), (RABBIT, 2.0, {"max_seconds": 5.3}), (TIMECODE, 4.0, {"max_seconds": 6})],
    ids=["1fps", "2fps-odd-length", "4fps-more-frames-than-trained"],
)
@torch.no_grad()
def test_streaming_equals_reference_prefill(llama, llama64, path, clip, fps, options, dtype):
    backbone = llama if dtype == torch.float32 else llama64
    inputs = reference_inputs(backbone, clip, fps, **options)
    expected = VideoLlama3ForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()(**inputs).logits
    assert clip == RABBIT or not inputs["video_compression_mask"].all(), "nothing to leave out"
    seen = inputs["input_ids"] == backbone.processor.video_token_id
    frames, rows, columns = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).repeat(frames, 1)
    for chunk_seconds in (1, 3, 20):
        logits, positions, modality = streamed(backbone, clip, fps, chunk_seconds, **options)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
        assert torch.equal(modality == VISUAL, seen)
        assert torch.equal(positions[0], torch.arange(seen.shape[1])[None])
        assert (positions[1:] == positions[0])[:, ~seen].all()
        assert torch.equal(positions[1:, seen], places[inputs["video_compression_mask"]].T)


def chunk_of(frames: np.ndarray, index: int, start: int) -> Chunk:
    """Frames without audio, one a second."""
    nothing, end = np.zeros(0, np.float32), start + len(frames)
    times = np.arange(start, end, dtype=np.float64)
    return Chunk(index, float(start), float(end), frames, times, None, nothing, nothing, last=False)


@torch.no_grad()
def test_what_did_not_change_is_left_out_across_chunks(llama):
    """Every frame comes three times, so chunks of two begin with a copy now and then."""
    still = np.repeat(whole_clip(RABBIT, 1.0, max_seconds=4).frames, 3, axis=0)
    processor = llama.processor.video_processor
    mask = processor(videos=[torch.from_numpy(still).permute(0, 3, 1, 2)], return_tensors="pt")[
        "video_compression_mask"
    ]
    expected = mask.view(len(still), -1).sum(1).tolist()
    assert expected.count(1) == 8 and min(expected[::3]) > 1
    for length in (1, 2, 5, 12):
        encoder, counts = llama.stream_encoder(video=True, audio=False, fps=1.0, duration=12.0), []
        fork = encoder.fork()
        for number, start in enumerate(range(0, 12, length)):
            chunk = chunk_of(still[start : start + length], number, start)
            inputs = encoder.encode(chunk)
            counts += [int((inputs.time == time).sum()) for time in chunk.frame_times]
            assert encoder.last_frame.untyped_storage().nbytes() == encoder.last_frame.nbytes, "not the whole chunk"
        assert counts == expected
        assert fork.last_frame is None


def test_an_answer_is_that_of_reference_generate_when_everything_is_kept(llama64, path):
    model = VideoLlama3ForConditionalGeneration.from_pretrained(path, dtype=torch.float64).eval()
    check_answer_of_reference(llama64, model, reference_inputs(llama64, WEBB, 1.0, max_seconds=12))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["omnimem", "hermes", "infinipot_v"])
def test_an_answer_is_the_greedy_one_at_the_memorys_own_ids(llama64, method, positions):
    check_answer_by_hand(llama64, method, positions)


# ---- frames and times ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_plan_is_an_upper_limit_and_a_chunk_encodes_no_more_than_itself(llama):
    seen: list[list[int]] = []
    handle = llama.model.model.vision_model.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(kwargs["grid_thw"].tolist()[0]), with_kwargs=True
    )
    reader, encoder = LONG.open(WEBB, llama)
    inputs = [encoder.encode(chunk) for chunk in reader]
    handle.remove()
    assert [frames for frames, _, _ in seen] == [3] * 4
    planned = llama.tokens_per_chunk(frame_size=(360, 640), audio=True, fps=1.0, seconds=12.0, chunk_seconds=3.0)
    found = [int((one.modality == VISUAL).sum()) for one in inputs]
    assert all(count <= most for count, (most, _) in zip(found, planned, strict=True))
    assert [most for most, _ in planned] == [frames * height * width // 4 for frames, height, width in seen]
    assert llama.tokens_per_chunk(frame_size=None, audio=True, fps=1.0, seconds=2.0, chunk_seconds=1.0) == [(0, 0)] * 2


def test_frames_share_the_pixels_of_the_longest_trained_clip(llama):
    size = llama.processor.video_processor.size["longest_edge"]
    assert [llama.frame_limits(frames).most for frames in (1, 4, MAX_FRAMES, 10_000, None)] == [
        *(size, size // 4),
        *[size // MAX_FRAMES] * 3,
    ]
    assert llama.frame_limits(None, max_pixels=4 * 28**2).most == 4 * 28**2


@torch.no_grad()
def test_a_long_stream_has_the_time_every_few_frames(llama):
    def text_of(timestamps: int | None) -> list[str]:
        encoder = llama.stream_encoder(video=True, audio=False, fps=1.0, duration=7.8, timestamps=timestamps)
        chunk = chunk_of(whole_clip(RABBIT, 1.0).frames, 0, 0)
        embeds = llama.language_model.get_input_embeddings().weight
        inputs = encoder.encode(chunk)
        text = inputs.embeds[0, inputs.modality[0] != VISUAL]
        return llama.tokenizer.decode(torch.cdist(text, embeds).argmin(1)).split(",")

    assert text_of(None) == [f"Time {second}.0s:" for second in range(8)]
    assert text_of(3) == ["Time 0.0s:", "Time 3.0s:", "Time 6.0s:"]


def test_reindexed_position_ids_stay_in_the_trained_range(path):
    backbone = load_backbone(path, dtype=torch.float32, device="cpu")
    ends = {}
    for positions in ("original", "compact"):
        session = session_of(backbone, mean=12, position_ids=positions)
        ends[positions] = [following(session.cache) for _ in session.watch(WEBB)]
    # What stays is text, and eight visual tokens.
    assert ends["original"][-1] > 120 and ends["compact"][-1] - ends["compact"][-2] < 40


def test_audio_alone_is_refused_and_beside_video_ignored(llama):
    with pytest.raises(OmniMemError, match="no video, and video_llama_3 does not support audio"):
        list(session_of(llama).watch(JFK))
    assert llama.stream_encoder(video=True, audio=True, fps=1.0).has_audio is False


# ---- checkpoint, training --------------------------------------------------------------------------------------------


def test_a_weight_that_is_missing_or_unknown_is_named(path, tmp_path):
    weights = load_file(path / "model.safetensors")
    roots = {".".join(name.split(".")[:2]) for name in weights}
    assert roots == {"model.language_model", "model.vision_model", "model.projector", "lm_head.weight"}
    check_strict_loading(path, tmp_path, "model.projector.readout.2.bias", "model.vision_model.head.probe")


def test_what_training_and_plans_ask_for(llama, path):
    names = [name for name, _ in llama.model.named_modules()]
    found = [name for name in names if re.fullmatch(llama.lora_target_regex(["q_proj", "down_proj"]), name)]
    assert len(found) == 3 * 2 and all(name.startswith("model.language_model.layers.") for name in found)
    assert sum(name.endswith(llama.projectors["visual"]) for name in names) == 1
    assert all(any(name.startswith(whole) for name in names) for whole in llama.skip_quantization_modules)
    assert llama.supports_audio is False
    assert ModelFingerprint.of(llama.config) == ModelFingerprint("qwen2", 3, 2, 16)
    assert load_backbone(path, device="meta").language_model.dtype == torch.bfloat16


def test_the_published_7b_is_planned_without_its_files():
    name = "lkhl/VideoLLaMA3-7B-Image-HF"
    backbone = build_on_meta(name, VideoLlama3, torch.bfloat16)
    assert PUBLISHED[name][0] == backbone.name
    assert sum(weight.numel() for weight in backbone.model.parameters()) == pytest.approx(8.04e9, rel=1e-3)
    assert backbone.frame_limits(180).most // 28**2 == 91
    counts = backbone.tokens_per_chunk(frame_size=(360, 640), audio=False, fps=1.0, seconds=200.0, chunk_seconds=100.0)
    assert counts == [(100 * 84, 0)] * 2


def test_small_checkpoints_with_tied_embeddings_load(tmp_path):
    """As published for 2B: no head is written."""
    folder = build_tiny(tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_backbone(folder, device="cpu")
    assert loaded.model.lm_head.weight is loaded.language_model.embed_tokens.weight


def test_a_trained_run_exports_what_the_reference_classes_load(tmp_path):
    check_trained_run(tmp_path, VideoLlama3, "<|video_pad|>", "train.per_device_train_batch_size=2")
