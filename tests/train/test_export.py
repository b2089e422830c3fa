"""An export loads in transformers, equals base + adapter, and appears complete or not at all."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnimem import StreamingSession
from omnimem.backbones import backbone_class, load_backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from small_runs import MEDIA, RABBIT, ROOT, copy_run, refused_export, start, trained_run, tree
from train.export import export_run
from train.peak_memory import peak_rss_bytes, reset_peak
from train.setup import load_base

TransformersModel = Qwen2_5OmniThinkerForConditionalGeneration
BENCHMARKS = ROOT / "tests" / "benchmarks"


def transformers_model(path: Path, dtype: torch.dtype = torch.float32):
    with quiet_transformers():
        model, info = TransformersModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
    return model.eval(), info


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(20, 480, (2, 60), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_transformers_loads_an_export_completely(export):
    model, info = transformers_model(export)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not [name for name in model.state_dict() if "lora" in name]
    assert not (export / "adapter_config.json").exists(), "from_pretrained would apply the adapter a second time"


def test_logits_of_an_export_equal_base_and_adapter(run, export):
    merged, _ = transformers_model(export)
    base, _ = transformers_model(run / "base")
    plain = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, str(run)).eval()
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 0.1, "the adapter does nothing"
    assert (logits(merged) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_only_the_projections_of_the_language_model_differ_from_the_base(run, export):
    merged, base = transformers_model(export)[0].state_dict(), transformers_model(run / "base")[0].state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    attention = [f"model.language_model.layers.{i}.self_attn" for i in range(3)]
    assert changed == {f"{module}.{name}_proj.weight" for module in attention for name in "qkvo"}


def test_transformers_processors_load(export):
    text = "What is seen?"
    for processor in (Qwen2_5OmniProcessor.from_pretrained(export), AutoProcessor.from_pretrained(export)):
        assert isinstance(processor, Qwen2_5OmniProcessor)
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
        conversation = [{"role": "user", "content": text}]
        assert text in processor.apply_chat_template(conversation, tokenize=False)


def test_an_export_has_a_profile_and_a_model_card(run, export):
    profile = BudgetProfile.load(export / "budget_profile.json")
    assert profile == BudgetProfile.load(run / "budget_profile.json")
    card = (export / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "base_model: " in card and "library_name: transformers" in card
    assert "24 tokens per layer (20 visual + 4 audio)" in card and "`float32`" not in card.split("---")[1]
    assert "StreamingSession.from_pretrained" in card and '"omnimem"' in card
    assert {path.suffix for path in export.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}


def test_an_export_contains_no_path_of_this_machine(run, export):
    """An export can be published; the run may contain the path of its base."""
    for name, content in tree(export).items():
        assert str(run.parent).encode() not in content, name


def test_run_and_export_give_the_same_answer(run, export):
    answers = []
    for path in (run, export):
        session = StreamingSession.from_pretrained(path)
        for _ in session.watch(MEDIA / RABBIT):
            pass
        answers.append(session.ask("What is seen?", max_new_tokens=12, min_new_tokens=12))
    assert answers[0] == answers[1] != ""


def test_a_checkpoint_and_a_moved_run_can_be_exported(run, tmp_path):
    export_run(run / "checkpoints" / "step-00000006", tmp_path / "from-checkpoint")
    moved = copy_run(run, tmp_path / "elsewhere")
    export_run(moved, tmp_path / "from-moved")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("from-checkpoint", "from-moved"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_a_bfloat16_run_exports_in_its_dtype_and_in_a_given_one(tmp_path):
    run = trained_run(tmp_path, "model.dtype=bfloat16", "train.max_steps=2", "train.learning_rate=3e-2")
    assert omnimem(["export", str(run), "--out", str(tmp_path / "a")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}
    assert omnimem(["export", str(run), "--out", str(tmp_path / "b"), "--dtype", "float32"]) == 0
    assert {value.dtype for value in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_run_exports_in_any_precision(run, tmp_path, dtype):
    assert omnimem(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", dtype]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}


def test_a_large_checkpoint_is_written_in_shards(run, export, tmp_path, monkeypatch):
    monkeypatch.setattr("train.export.SHARD", "200KB")
    export_run(run, tmp_path / "out")
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("model-*.safetensors"))]
    assert len(shards) > 2
    assert sorted(name for shard in shards for name in shard) == sorted(load_file(export / "model.safetensors"))
    found, expected = transformers_model(tmp_path / "out")[0].state_dict(), transformers_model(export)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_correct_bfloat16_export_of_a_mixture_of_experts_passes(tmp_path, monkeypatch):
    """Rounding can route a token to another expert and change its logits by half of the largest in bfloat16."""
    base = backbone_class("qwen3_omni").build_tiny(tmp_path / "base")
    backbone = load_backbone(base, dtype="bfloat16", device="cpu")
    targets = backbone.lora_target_regex(["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(backbone.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.setattr("train.export.SHARD", "100KB")
    checked = export_run(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", base=base)
    assert checked.difference == 0 < checked.rounding
    assert load_backbone(tmp_path / "out", device="cpu").name == "qwen3_omni"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == load_file(base / "model.safetensors").keys(), "single experts, as published"
    assert len(set(index.values())) > 2


# ---- device and memory -----------------------------------------------------------------------------------------------


def test_an_export_runs_on_the_cpu_even_with_an_accelerator(run, tmp_path, monkeypatch, capsys):
    """Loading a model to a GPU would fail on this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    export_run(run, tmp_path / "out")
    assert "'nosuch'" in refused_export(capsys, run, tmp_path / "other", "--device", "nosuch")


def test_no_two_models_are_in_memory_at_once(run, tmp_path, monkeypatch):
    loaded = []

    def load(*args, **kwargs):
        assert not [one for one in loaded if one() is not None], "an earlier model is still alive"
        backbone = load_backbone(*args, **kwargs)
        loaded.append(weakref.ref(backbone.model))
        return backbone

    monkeypatch.setattr("train.export.load_backbone", load)
    export_run(run, tmp_path / "out")
    assert len(loaded) == 2, "the base, and what was written"


def test_the_trained_model_is_released_before_the_export(tmp_path, monkeypatch):
    trained, exported = [], []

    def load(*args):
        backbone = load_base(*args)
        trained.append(weakref.ref(backbone.model))
        return backbone

    def export(*args, **kwargs):
        exported.append([one() for one in trained])
        return export_run(*args, **kwargs)

    monkeypatch.setattr("train.loop.load_base", load)
    monkeypatch.setattr("train.finish.export_run", export)
    run = trained_run(tmp_path, "finish.export=true", "train.max_steps=1")
    assert exported == [[None]]
    assert (run / "merged" / "model.safetensors").is_file()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be read and reset on Linux only")
def test_the_export_reports_its_peak_host_memory(run, tmp_path, capsys):
    """Without earlier work of the process; the interpreter and its libraries are included."""
    large = torch.ones(2**28)
    del large
    before = peak_rss_bytes()
    assert omnimem(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    (stated,) = re.findall(r"peak host memory of the process ([\d.]+) GiB", capsys.readouterr().out)
    assert peak_rss_bytes() < before - 2**29
    assert float(stated) == pytest.approx(peak_rss_bytes() / 2**30, abs=0.1)
    reset_peak()
    level = peak_rss_bytes()
    torch.ones(2**28)  # larger than any free block that earlier tests have left
    assert peak_rss_bytes() > level + 2**29


@pytest.mark.long
def test_an_export_needs_memory_for_one_copy_of_the_model(tmp_path):
    small = ("--sizes", "60,150", "--out", str(tmp_path / "results.json"))
    done = start(BENCHMARKS / "export_memory.py", *small, PYTHONPATH=str(BENCHMARKS.parents[1]))
    assert done.returncode == 0, done.stdout + done.stderr
    slopes = json.loads((tmp_path / "results.json").read_text())["slopes"]
    assert all(0.5 < slope["anonymous"] < 1.3 for slope in slopes.values()), slopes
