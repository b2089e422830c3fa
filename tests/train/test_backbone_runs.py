"""Complete runs on every kind of backbone: resuming, export, two processes, questions before the first frame."""

from __future__ import annotations

import shutil

import pytest
import torch
from backbone_setup import (
    CHUNKED,
    HEARD,
    LONG,
    MERGERS,
    SEEN,
    SHORT,
)

from omnimem.backbones import load_backbone
from omnimem.bptt import ChunkwiseBPTT
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.memory.offload_store import Store
from omnimem.selection import build_selection
from small_runs import (
    HALF,
    PLAIN,
    SILENT,
    adapter,
    arguments,
    configured,
    largest_difference,
    main,
    metrics,
    trained_run,
)

# ---- complete runs ---------------------------------------------------------------------------------------------------

RUN = ("model.backbone=video_salmonn2", *CHUNKED["video_salmonn2"])


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ("selection.gradient=straight_through", "distill.weight=0.5", "eval.eval_steps=1", "eval"),
        pytest.param(("selection.gradient=soft", "lora.lora_dropout=0.1"), marks=pytest.mark.long),
        pytest.param((MERGERS["video_salmonn2"], "train.per_device_train_batch_size=2"), marks=pytest.mark.long),
        pytest.param(
            ("selection.position_ids=compact", "selection.method=h2o", "selection.gradient=none"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["straight_through", "soft", "projectors", "compact"],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, more):
    settings = [*RUN, "train.max_steps=2", "train.save_steps=1", *(one for one in more if one != "eval")]
    if "eval" in more:
        settings += [f"eval.path={tmp_path / 'data.jsonl'}", f"eval.root={arguments(tmp_path)[2].split('=')[1]}"]
    rows = [LONG, SHORT]
    whole, parts = (trained_run(tmp_path, *settings, rows=rows, out=out) for out in ("whole", "parts"))
    shutil.rmtree(parts / "checkpoints" / "step-00000002")
    (parts / "adapter_model.safetensors").unlink()
    assert main(arguments(tmp_path, *settings, rows=rows, out="parts")) == 0
    assert all(torch.equal(value, adapter(parts)[name]) for name, value in adapter(whole).items())
    assert all(value.any() for name, value in adapter(whole).items() if "lora_B" in name)
    for found, wanted in zip(metrics(parts)[-2:], metrics(whole), strict=True):
        assert (found["loss"], found["grad_norm"], found.get("eval_loss")) == (
            wanted["loss"], wanted["grad_norm"], wanted.get("eval_loss"),
        )  # fmt: skip
    assert "eval" not in more or all(record["eval_loss"] > 0 for record in metrics(whole))


@pytest.mark.long
def test_the_quantized_recipe_trains_and_exports_into_full_precision(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    settings = ("model.name_or_path=tiny", "train.max_steps=2", "data.max_seconds=6", "lora.r=4", "lora.lora_alpha=8")
    assert main(["recipe=video_salmonn_qlora", *settings, f"output_dir={out}"]) == 0
    assert omnimem(["export", str(out), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    merged, base = (load_backbone(path, dtype="float32", device="cpu") for path in (tmp_path / "merged", out / "base"))
    assert not any("4bit" in type(module).__name__ for module in merged.model.modules())
    changed = {
        name
        for (name, ours), theirs in zip(
            merged.model.state_dict().items(), base.model.state_dict().values(), strict=True
        )
        if not torch.equal(ours, theirs)
    }
    assert changed and all("language_model.layers" in name and "_proj" in name for name in changed)


@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_only_projections_of_the_decoder_are_quantized(tiny_of, name):
    pytest.importorskip("bitsandbytes")
    quantized = load_backbone(tiny_of(name), dtype="float32", device="cpu", load_in_4bit=True)
    linear = [name for name, module in quantized.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(linear) == 4 * (4 if name == "qwen3_omni" else 7)
    assert all(".language_model.layers." in name for name in linear)


# ---- several processes -----------------------------------------------------------------------------------------------

HARD = ("selection.gradient=none",)
WITH_GRADIENT = (
    "selection.gradient=straight_through",
    "distill.weight=0.5",
    "train.bptt_window=1",
    "train.detach_below_layer=1",
)
UNEQUAL = {"video_salmonn2": [LONG, HEARD, SEEN, SHORT], "qwen3_omni": [SHORT, HEARD, SEEN, SHORT]}


@pytest.mark.long
@pytest.mark.parametrize("name", list(UNEQUAL))
@pytest.mark.parametrize(
    "more", [HARD, WITH_GRADIENT, (*HARD, "selection.method=streammem")], ids=["hard", "straight_through", "probes"]
)
def test_two_processes_equal_one_with_every_sharding(tmp_path, name, more):
    """Shards of experts, which are not linear layers, and deepstack inputs in only one of the processes."""
    settings = (*PLAIN, "train.max_steps=2", "train.save_steps=2", f"model.backbone={name}", *CHUNKED[name], *more)
    rows = UNEQUAL[name]
    assert main(arguments(tmp_path, *settings, "train.gradient_accumulation_steps=2", rows=rows, out="alone")) == 0
    expected = adapter(tmp_path / "alone")
    assert all(value.abs().max() > 1e-4 for key, value in expected.items() if "lora_B" in key), "it moved"
    for launcher in ("multi_gpu", "deepspeed_zero2", "deepspeed_zero3"):
        done = configured(launcher, *arguments(tmp_path, *settings, rows=rows, out=launcher))
        assert done.returncode == 0, done.stderr
        assert largest_difference(adapter(tmp_path / launcher), expected) <= 1e-6
        for found, wanted in zip(metrics(tmp_path / launcher), metrics(tmp_path / "alone"), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.long
def test_a_clip_that_breaks_before_its_first_frame_does_not_block_other_processes(tmp_path):
    """Media that have not begun have no closing tokens; in lockstep the process still makes its passes."""
    rows = [{"media": SILENT, "question": "What?", "answer": "A mirror."}, {**HEARD, "media": HALF}]
    settings = (*PLAIN, *RUN, "distill.weight=0.5", "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2")
    done = configured("deepspeed_zero3", *arguments(tmp_path, *settings, rows=rows))
    assert done.returncode == 0, done.stderr
    assert [record["skipped"] for record in metrics(tmp_path / "run")] == [False, False]


@pytest.mark.parametrize("name", ["qwen3_vl", "video_salmonn2"])
def test_a_question_before_the_first_frame(tiny_of, name):
    """There are no media to close yet."""
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    profile = BudgetProfile.uniform(backbone.config, 24, 5.0 if backbone.supports_audio else float("inf"))
    stream = Stream(backbone, CompressedCache(profile, build_selection("omnimem")))
    encoder = backbone.stream_encoder(video=True, audio=False, fps=1.0)
    tape = ChunkwiseBPTT(stream, Store(), lockstep=True)
    tape.forward(encoder.prefix())
    assert len(encoder.closing()) == 0
    following = stream.cache.next_position_id
    with torch.no_grad(), stream.cache.scratch():
        assert stream.forward(encoder.closing(), text=True).shape[1] == 0
        assert stream.cache.next_position_id is following
    question, answer = backbone.question_ids("What?")[0], backbone.answer_ids("Nothing.")[0]
    logits, _ = stream.answer_logits(encoder.closing(), [question], [answer])
    assert logits.isfinite().all()
