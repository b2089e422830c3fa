"""The verification of an export detects every difference from base + adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from test_export import TransformersModel, logits, transformers_model

from omnimem.errors import OmniMemError
from small_runs import refused_export
from train.export import export_run


def change_after(monkeypatch, cls: type, method: str, change: Callable[..., None]) -> None:
    """Call `change` on the object and the arguments after each call of a method."""
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
    refused_export(capsys, run, tmp_path / "out")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("what was there before")
    refused_export(capsys, run, tmp_path / "old", "--overwrite")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_without_its_adapter_does_not_appear(run, tmp_path, capsys, monkeypatch, dtype):
    """The rounding of bfloat16 is small enough to detect a missing adapter."""
    monkeypatch.setattr(LoraLinear, "merge", lambda self, **_: None)
    line = refused_export(capsys, run, tmp_path / "out", "--dtype", dtype)
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
def test_a_slightly_wrong_merge_is_detected(run, tmp_path, capsys, monkeypatch, dtype, change):
    """The written tensors equal the merged ones, so only the elementwise check of the merge detects it."""
    change_after(monkeypatch, LoraLinear, "merge", lambda layer, *_: change(layer))
    line = refused_export(capsys, run, tmp_path / "out", "--dtype", dtype)
    assert "the merged model differs from base + adapter in " in line


@pytest.mark.parametrize("name", ["audio_tower.layers.0.fc1.weight", "visual.blocks.1.attn.proj.bias", "mlp.up_proj"])
def test_one_number_that_changes_on_disk_is_detected(run, tmp_path, capsys, monkeypatch, name):
    """Logits of text do not depend on the weights of an encoder."""

    def change(_, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        damaged = next(key for key in weights if name in key)
        number = weights[damaged].view(-1)[5:6]
        number.copy_(number.nextafter(torch.tensor(torch.inf)))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    change_after(monkeypatch, TransformersModel, "save_pretrained", change)
    line = refused_export(capsys, run, tmp_path / "out")
    assert "the written checkpoint differs from base + adapter in " in line and name in line


@pytest.mark.parametrize(
    ("dtype", "factor", "least", "most"), [("float32", 1.001, 1e-4, 1e-3), ("bfloat16", 1.05, 0.01, 0.04)]
)
def test_a_configuration_that_changes_on_disk_is_detected(
    run, tmp_path, capsys, monkeypatch, dtype, factor, least, most
):
    """The base of the rotary frequencies is in no tensor; it changes logits by about 2 % in bfloat16."""

    def change(_, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rope_parameters"]["rope_theta"] *= factor
        (folder / "config.json").write_text(json.dumps(config))

    whole = tmp_path / "whole"
    export_run(run, whole, dtype=dtype)
    before = logits(transformers_model(whole, getattr(torch, dtype))[0])
    change(None, whole)
    moved = (logits(transformers_model(whole, getattr(torch, dtype))[0]) - before).abs().max() / before.abs().max()
    assert least < moved < most
    change_after(monkeypatch, TransformersModel, "save_pretrained", change)
    line = refused_export(capsys, run, tmp_path / "out", "--dtype", dtype)
    assert "other logits" in line and "configuration" in line


def test_the_library_call_raises_the_same(tiny_path, tmp_path):
    with pytest.raises(OmniMemError, match="no adapter"):
        export_run(tiny_path, tmp_path / "out")
