"""Training the projectors between encoders and decoder: exact gradients, their own learning rate."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from omnimem.backbones import load_backbone
from omnimem.cli import main as omnimem
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.recipe import load_recipe
from small_runs import adapter, arguments, main, trained_run
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import tokenize_row
from train.setup import add_lora, budget_profile, selection_method, stream_settings

BOTH = "lora.modules_to_save=[visual,audio]"


def test_gradients_of_projectors_equal_plain_autograd(tmp_path):
    recipe = load_recipe(arguments(tmp_path, BOTH, "model.dtype=float64"))
    backbone = load_backbone("tiny", dtype="float64", device="cpu")
    backbone.model.requires_grad_(False)
    method, settings = selection_method(recipe), stream_settings(recipe)
    profile = budget_profile(recipe, backbone, method, settings)
    model = add_lora(recipe, backbone)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    sample = tokenize_row(load_rows(recipe.data).rows[1], backbone)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = [name for name in trained if "modules_to_save" in name]
    assert any("merger" in name for name in whole) and any("audio_tower.proj" in name for name in whole)

    stream = Stream(backbone, CompressedCache(profile, method))
    reader, encoder = settings.open(sample.row.media, backbone)
    stream.forward(encoder.prefix(), text=True)
    losses, pending = [], list(sample.questions)
    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while pending and pending[0].time is not None and pending[0].time <= chunk.t1:
            losses.append((encoder.closing(), pending.pop(0)))
            losses[-1] = loss_of(stream, *losses[-1])
    losses += [loss_of(stream, encoder.closing(), asked) for asked in pending]
    torch.stack(losses).sum().backward()
    expected = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    objective = StreamObjective(backbone, model, profile, method, settings, train_encoders=True)
    objective([sample]).backward(1.0)
    for name, parameter in trained.items():
        scale = expected[name].abs().max()
        assert scale > 0
        assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * scale, name


def loss_of(stream, closing, asked):
    logits, targets = stream.answer_logits(closing, [asked.question], [asked.answer])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_a_run_trains_saves_and_exports_projectors(tmp_path, dtype):
    run = trained_run(tmp_path, BOTH, f"model.dtype={dtype}", "train.modules_to_save_learning_rate=1e-3")
    saved = adapter(run)
    whole = {name: value for name, value in saved.items() if "lora" not in name}
    assert whole and all(value.dtype == torch.float32 for value in whole.values())
    out = tmp_path / "merged"
    assert omnimem(["export", str(run), "--out", str(out)]) == 0
    before, after = (load_backbone(path, dtype=dtype, device="cpu").model.state_dict() for path in (run / "base", out))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    projectors = {name for name in before if "visual.merger" in name or "audio_tower.proj" in name}
    assert projectors & changed and all("language_model" in name for name in changed - projectors)


def test_projectors_have_their_own_learning_rate(tmp_path):
    """With SGD a step is the rate times the gradient: at a rate of zero nothing changes."""
    settings = (BOTH, "train.optim=sgd", "train.max_steps=1", "train.save_steps=1", "model.dtype=float64")
    still = adapter(trained_run(tmp_path, *settings, "train.modules_to_save_learning_rate=0.0", out="still"))
    moved = adapter(trained_run(tmp_path, *settings, "train.modules_to_save_learning_rate=1e-2", out="moved"))
    base = load_file(tmp_path / "still" / "base" / "model.safetensors")
    for name, value in still.items():
        if "lora" in name:
            assert torch.equal(value, moved[name])
        else:
            original = next(base[key] for key in base if key.endswith(name.removeprefix("base_model.model.model.")))
            assert torch.equal(value, original.double()) and not torch.equal(value, moved[name])


@pytest.mark.long
def test_a_run_with_projectors_resumes_to_the_same_bits(tmp_path):
    settings = (BOTH, "train.max_steps=4", "train.save_steps=2")
    whole = trained_run(tmp_path, *settings, out="whole")
    parts = trained_run(tmp_path, *settings, out="parts")
    shutil.rmtree(parts / "checkpoints" / "step-00000004")
    (parts / "adapter_model.safetensors").unlink()
    assert main(arguments(tmp_path, *settings, out="parts")) == 0
    assert all(torch.equal(value, adapter(parts)[name]) for name, value in adapter(whole).items())


def test_an_unknown_projector_is_one_line(tmp_path, capsys):
    assert main(arguments(tmp_path, "lora.modules_to_save=[qformer]")) == 2
    error = capsys.readouterr().err
    assert "lora.modules_to_save: 'qformer' must be one of visual, audio" in error and error.count("\n") == 1


def test_a_base_with_trained_projectors_cannot_be_the_teacher(tmp_path, capsys):
    assert main(arguments(tmp_path, BOTH, "distill.weight=1.0")) == 2
    assert (
        "the base model cannot be the teacher while lora.modules_to_save trains its projectors"
        in capsys.readouterr().err
    )
