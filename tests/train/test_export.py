"""An export is what stock transformers loads, equals base + adapter, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnimem import StreamingSession
from omnimem.backbones import backbone_class, load_backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.qwen2_5_omni.tiny import build_tiny
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from small_runs import MEDIA, RABBIT, ROOT, copy_run, lines, start, trained_run, tree
from train.export import export_run
from train.host_memory import peak_bytes, reset_peak
from train.setup import load_base

Stock = Qwen2_5OmniThinkerForConditionalGeneration
BENCHMARKS = ROOT / "tests" / "benchmarks"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run whose adapter has moved far enough for its logits to be told from the base's."""
    return trained_run(
        tmp_path_factory.mktemp("run"), "train.max_steps=6", "train.learning_rate=3e-2", "train.save_steps=3"
    )


@pytest.fixture(scope="module")
def export(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "merged"
    assert omnimem(["export", str(run), "--out", str(out)]) == 0
    return out


def stock(path: Path, dtype: torch.dtype = torch.float32):
    with quiet_transformers():
        model, info = Stock.from_pretrained(path, dtype=dtype, output_loading_info=True)
    return model.eval(), info


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(20, 480, (2, 60), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_stock_transformers_loads_it_completely(export):
    model, info = stock(export)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not [name for name in model.state_dict() if "lora" in name]
    assert not (export / "adapter_config.json").exists(), "stock from_pretrained would put the adapter on a second time"


def test_its_logits_are_those_of_base_and_adapter(run, export):
    merged, _ = stock(export)
    base, _ = stock(run / "base")
    plain = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, str(run)).eval()
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 0.1, "the adapter does nothing"
    assert (logits(merged) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_only_the_projections_of_the_language_model_differ_from_the_base(run, export):
    merged, base = stock(export)[0].state_dict(), stock(run / "base")[0].state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    attention = [f"model.language_model.layers.{i}.self_attn" for i in range(3)]
    assert changed == {f"{module}.{name}_proj.weight" for module in attention for name in "qkvo"}


def test_stock_processors_load(export):
    text = "What is seen?"
    for processor in (Qwen2_5OmniProcessor.from_pretrained(export), AutoProcessor.from_pretrained(export)):
        assert isinstance(processor, Qwen2_5OmniProcessor)
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
        conversation = [{"role": "user", "content": text}]
        assert text in processor.apply_chat_template(conversation, tokenize=False)


def test_profile_and_model_card_are_there(run, export):
    profile = BudgetProfile.load(export / "budget_profile.json")
    assert profile == BudgetProfile.load(run / "budget_profile.json")
    card = (export / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "base_model: " in card and "library_name: transformers" in card
    assert "24 positions a layer (20 visual + 4 audio)" in card and "`float32`" not in card.split("---")[1]
    assert "StreamingSession.from_pretrained" in card and '"omnimem"' in card
    assert {path.suffix for path in export.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}


def test_nothing_in_it_names_this_machine(run, export):
    """An export is made to be published; the run itself may say where its base lies."""
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


def test_a_checkpoint_and_a_moved_run_export_too(run, tmp_path):
    export_run(run / "checkpoints" / "step-00000006", tmp_path / "from-checkpoint")
    moved = copy_run(run, tmp_path / "elsewhere")
    export_run(moved, tmp_path / "from-moved")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("from-checkpoint", "from-moved"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bfloat16_run_exports_as_trained_and_as_asked(tmp_path):
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
    found, expected = stock(tmp_path / "out")[0].state_dict(), stock(export)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_honest_bfloat16_export_of_a_mixture_of_experts_passes(tmp_path, monkeypatch):
    """Rounding can send a token to another expert, and its logits anywhere: in bfloat16 by half of the largest."""
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


# ---- where and in what memory ----------------------------------------------------------------------------------------


def test_it_happens_on_the_cpu_where_there_is_an_accelerator(run, tmp_path, monkeypatch, capsys):
    """On this machine a model that was sent to a GPU would not load."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    export_run(run, tmp_path / "out")
    assert "'nosuch'" in refused(capsys, run, tmp_path / "other", "--device", "nosuch")


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


def test_the_model_that_was_trained_is_released_before_the_run_is_exported(tmp_path, monkeypatch):
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
def test_the_export_states_its_own_peak_of_host_memory(run, tmp_path, capsys):
    """Not that of what the process did before; the interpreter and its libraries are in it."""
    large = torch.ones(2**28)
    del large
    before = peak_bytes()
    assert omnimem(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    (stated,) = re.findall(r"peak host memory of the process ([\d.]+) GiB", capsys.readouterr().out)
    assert peak_bytes() < before - 2**29
    assert float(stated) == pytest.approx(peak_bytes() / 2**30, abs=0.1)
    reset_peak()
    level = peak_bytes()
    torch.ones(2**26)
    assert peak_bytes() > level + 2**27


@pytest.mark.long
def test_an_export_needs_memory_for_one_copy_of_the_model(tmp_path):
    small = ("--sizes", "60,150", "--out", str(tmp_path / "results.json"))
    done = start(BENCHMARKS / "export_memory.py", *small, PYTHONPATH=str(BENCHMARKS.parents[1]))
    assert done.returncode == 0, done.stdout + done.stderr
    slopes = json.loads((tmp_path / "results.json").read_text())["slopes"]
    assert all(0.5 < slope["anonymous"] < 1.3 for slope in slopes.values()), slopes


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(capsys, run: Path, out: Path, *options: str) -> str:
    """The one line of an export that must not happen; the run, and what is at `out`, stay as they were."""
    before = tree(run), tree(out) if out.is_dir() else None
    beside = sorted(path.name for path in out.parent.iterdir()) if out.parent.is_dir() else None
    capsys.readouterr()
    assert omnimem(["export", str(run), "--out", str(out), *options]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("omnimem: ")
    assert (tree(run), tree(out) if out.is_dir() else None) == before
    assert beside == (sorted(path.name for path in out.parent.iterdir()) if out.parent.is_dir() else None)
    return line


def test_no_adapter(tiny_path, tmp_path, capsys):
    assert "no adapter" in refused(capsys, tiny_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no adapter" in refused(capsys, tmp_path / "empty", tmp_path / "out")
    assert "nosuch" in refused(capsys, tmp_path / "nosuch", tmp_path / "out")


def test_a_run_that_has_not_finished(run, tmp_path, capsys):
    unfinished = copy_run(run, tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json", "budget_profile.json"):
        (unfinished / name).unlink()
    assert "without an adapter" in refused(capsys, unfinished, tmp_path / "out")


@pytest.mark.parametrize("place", [".", "..", "../..", "base", "checkpoints"])
def test_an_output_that_would_replace_its_own_input(run, tmp_path, capsys, place):
    copied = copy_run(run, tmp_path / "runs" / "mine")
    refused(capsys, copied, copied / place, "--overwrite")
    refused(capsys, copied, Path(os.path.relpath(copied)) / place, "--overwrite")


def test_an_output_that_would_replace_the_base_of_the_run(run, tmp_path, capsys):
    """The base of a real run is the user's own download, somewhere else."""
    copied, base = copy_run(run, tmp_path / "run"), copy_run(run / "base", tmp_path / "models" / "omni")
    shutil.rmtree(copied / "base")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    export_run(copied, tmp_path / "fine")
    assert str(base) in refused(capsys, copied, base, "--overwrite")


def test_an_output_that_is_not_empty(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "--overwrite" in refused(capsys, run, out)
    assert omnimem(["export", str(run), "--out", str(out), "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()
    (tmp_path / "file").write_text("precious")
    assert "file" in refused(capsys, run, tmp_path / "file", "--overwrite")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", "truncated"),
        ("adapter_model.safetensors", "noise"),
        ("adapter_model.safetensors", "missing"),
        ("adapter_config.json", "truncated"),
        ("adapter_config.json", "noise"),
        ("budget_profile.json", "truncated"),
        ("budget_profile.json", "missing"),
    ],
)
def test_a_damaged_run(run, tmp_path, capsys, file, content):
    damaged = copy_run(run, tmp_path / "run")
    path = damaged / file
    whole = path.read_bytes()
    if content == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else b'{"noise": 1}' + bytes(99))
    assert str(damaged) in refused(capsys, damaged, tmp_path / "out")


@pytest.mark.parametrize("base", [{"hidden": 128}, {"layers": 2}, {"layers": 4}], ids=str)
def test_an_adapter_of_another_model(run, tmp_path, capsys, base):
    other = copy_run(run, tmp_path / "run")
    build_tiny(other / "base", **base)
    refused(capsys, other, tmp_path / "out")


def test_a_misfit_is_one_line_in_a_process_of_its_own_too(run, tmp_path):
    """Where warnings of the stock libraries would reach the terminal."""
    other = copy_run(run, tmp_path / "run")
    build_tiny(other / "base", layers=4)
    done = start("-m", "omnimem", "export", other, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = lines(done.stderr)
    assert line.startswith("omnimem: ") and str(other) in line


def test_an_adapter_with_a_weight_too_few_or_too_many(run, tmp_path, capsys):
    for change in ("less", "more"):
        other = copy_run(run, tmp_path / change)
        weights = load_file(other / "adapter_model.safetensors")
        name = sorted(weights)[0]
        if change == "less":
            weights.pop(name)
        else:
            weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
        save_file(weights, other / "adapter_model.safetensors")
        assert "layers." in refused(capsys, other, tmp_path / "out")


def test_an_adapter_that_is_not_finite(run, tmp_path, capsys):
    other = copy_run(run, tmp_path / "run")
    weights = load_file(other / "adapter_model.safetensors")
    name = next(name for name in sorted(weights) if "lora_B" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, other / "adapter_model.safetensors")
    assert str(other) in refused(capsys, other, tmp_path / "out")


# ---- verification ----------------------------------------------------------------------------------------------------


def change_after(monkeypatch, cls: type, method: str, change: Callable[..., None]) -> None:
    """Let `change` act on the object, and on what the method was given, after each genuine call of a method."""
    genuine = getattr(cls, method)

    def changed(self, *args, **kwargs):
        result = genuine(self, *args, **kwargs)
        change(self, *args)
        return result

    monkeypatch.setattr(cls, method, changed)


@torch.no_grad()
def disturbed(tuner: LoraModel) -> None:
    tuner.model.model.language_model.layers[1].self_attn.v_proj.weight[3, 3] += 1e-6


def extended(tuner: LoraModel) -> None:
    tuner.model.model.language_model.layers[0].extra = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("change", [disturbed, extended])
def test_an_export_that_differs_does_not_appear(run, tmp_path, capsys, monkeypatch, change):
    change_after(monkeypatch, LoraModel, "unload", change)
    refused(capsys, run, tmp_path / "out")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("what was there before")
    refused(capsys, run, tmp_path / "old", "--overwrite")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_without_its_adapter_does_not_appear(run, tmp_path, capsys, monkeypatch, dtype):
    """Rounding is coarse in bfloat16, but not so coarse that a forgotten adapter could hide in it."""
    monkeypatch.setattr(LoraLinear, "merge", lambda self, **_: None)
    line = refused(capsys, run, tmp_path / "out", "--dtype", dtype)
    assert "the merged model differs from base + adapter in " in line


def scaled(factor: float) -> Callable[..., None]:
    def change(layer: LoraLinear) -> None:
        layer.get_base_layer().weight.data *= factor

    return change


def stronger(layer: LoraLinear) -> None:
    """An adapter that is applied 2 % too strongly."""
    layer.get_base_layer().weight.data += 0.02 * layer.get_delta_weight("default")


@pytest.mark.parametrize(
    ("dtype", "change"),
    [("float32", scaled(1 + 1e-5)), ("float32", stronger), ("bfloat16", scaled(1 + 2**-8)), ("bfloat16", stronger)],
    ids=["float32 scaled", "float32 stronger", "bfloat16 half a step", "bfloat16 stronger"],
)
def test_a_merge_that_is_a_little_wrong_is_found(run, tmp_path, capsys, monkeypatch, dtype, change):
    """What is written is what was merged, so that the elementwise check of the merge alone can see it."""
    change_after(monkeypatch, LoraLinear, "merge", lambda layer, *_: change(layer))
    line = refused(capsys, run, tmp_path / "out", "--dtype", dtype)
    assert "the merged model differs from base + adapter in " in line


@pytest.mark.parametrize("name", ["audio_tower.layers.0.fc1.weight", "visual.blocks.1.attn.proj.bias", "mlp.up_proj"])
def test_one_number_that_changes_on_its_way_to_the_disk_is_found(run, tmp_path, capsys, monkeypatch, name):
    """Logits of text cannot see the weights of an encoder."""

    def change(_, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        damaged = next(key for key in weights if name in key)
        number = weights[damaged].view(-1)[5:6]
        number.copy_(number.nextafter(torch.tensor(torch.inf)))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    change_after(monkeypatch, Stock, "save_pretrained", change)
    line = refused(capsys, run, tmp_path / "out")
    assert "the written checkpoint differs from base + adapter in " in line and name in line


@pytest.mark.parametrize(
    ("dtype", "factor", "least", "most"), [("float32", 1.001, 1e-4, 1e-3), ("bfloat16", 1.05, 0.01, 0.04)]
)
def test_a_configuration_that_changes_on_its_way_to_the_disk_is_found(
    run, tmp_path, capsys, monkeypatch, dtype, factor, least, most
):
    """Tensors cannot show the base of the rotary frequencies; it moves logits by about 2 % in bfloat16."""

    def change(_, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rope_parameters"]["rope_theta"] *= factor
        (folder / "config.json").write_text(json.dumps(config))

    whole = tmp_path / "whole"
    export_run(run, whole, dtype=dtype)
    before = logits(stock(whole, getattr(torch, dtype))[0])
    change(None, whole)
    moved = (logits(stock(whole, getattr(torch, dtype))[0]) - before).abs().max() / before.abs().max()
    assert least < moved < most
    change_after(monkeypatch, Stock, "save_pretrained", change)
    line = refused(capsys, run, tmp_path / "out", "--dtype", dtype)
    assert "other logits" in line and "configuration" in line


def test_the_library_call_raises_the_same(tiny_path, tmp_path):
    with pytest.raises(OmniMemError, match="no adapter"):
        export_run(tiny_path, tmp_path / "out")
