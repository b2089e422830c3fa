"""Runs that train the heads of selection.method=learned: alone, with LoRA, resumed, exported, asked."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from clips import MEDIA
from omnimem.backbones import load_backbone
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.selection.heads_file import HEADS_FILE
from omnimem.stream import StreamingSession
from small_runs import RABBIT, adapter, arguments, main, refused, trained_run

HEADS = ("selection.method=learned", "selection.attention_term=true")
ALONE = (*HEADS, "lora.r=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Heads trained alone."""
    return trained_run(tmp_path_factory.mktemp("heads"), *ALONE)


def stream(session: StreamingSession) -> list[torch.Tensor]:
    """Retained tokens of every layer after a clip."""
    for _ in session.watch(MEDIA / RABBIT):
        pass
    return [session.cache.token_metadata(layer).index for layer in range(len(session.cache.layers))]


def test_heads_alone_leave_no_adapter_and_the_base_unchanged(run, tmp_path):
    assert not (run / "adapter_model.safetensors").exists()
    weights = load_file(run / HEADS_FILE)
    assert {name.split(".", 2)[2] for name in weights} == {"outer.weight", "novelty", "terms.attention"}
    assert all(weight.abs().max() > 0 for weight in weights.values())
    assert omnimem(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    base, merged = (load_backbone(path).model.state_dict() for path in (run / "base", tmp_path / "merged"))
    assert base.keys() == merged.keys() and all(torch.equal(base[name], merged[name]) for name in base)
    assert (tmp_path / "merged" / HEADS_FILE).read_bytes() == (run / HEADS_FILE).read_bytes()


def test_trained_heads_decide_what_is_retained(run, tmp_path):
    assert omnimem(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    trained = stream(StreamingSession.from_pretrained(run))
    exported = stream(StreamingSession.from_pretrained(tmp_path / "merged"))
    untrained = stream(StreamingSession.from_pretrained(run, method="novelty"))
    assert all(torch.equal(one, other) for one, other in zip(trained, exported, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(trained, untrained, strict=True))


def test_other_budgets_apply_at_inference(run):
    session = StreamingSession.from_pretrained(run, mean_budget=12)
    stream(session)
    assert session.cache.mean_token_counts()["visual"] + session.cache.mean_token_counts()["audio"] == 12


def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path):
    folder = trained_run(tmp_path, *ALONE)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / HEADS_FILE).unlink()
    assert main(arguments(tmp_path, *ALONE)) == 0
    found, expected = load_file(folder / HEADS_FILE), load_file(run / HEADS_FILE)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_heads_and_lora_train_together(tmp_path):
    run = trained_run(tmp_path, *HEADS, "train.max_steps=2", "selection.head_hidden_size=4")
    assert any(value.abs().max() > 0 for name, value in adapter(run).items() if "lora_B" in name)
    assert "layers.0.inner.weight" in load_file(run / HEADS_FILE)
    assert BudgetProfile.load(run / "budget_profile.json").selection_heads
    stream(StreamingSession.from_pretrained(run))


def test_heads_have_their_own_learning_rate(run, tmp_path):
    other = trained_run(tmp_path, *ALONE, "train.selection_learning_rate=0", "train.max_steps=2")
    weights = load_file(other / HEADS_FILE)
    assert all(torch.equal(weights[name], torch.full_like(weights[name], float("novelty" in name))) for name in weights)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "no such file"),
        (lambda file: file.write_bytes(b"nothing"), "not a readable file of selection heads"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4] + b"abcd"), "not the heads that the budget profile"),
    ],
    ids=["missing", "damaged", "another file"],
)
def test_a_missing_or_foreign_file_is_one_line(run, tmp_path, damage, words):
    shutil.copytree(run, tmp_path / "copy")
    assert omnimem(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    damage(tmp_path / "merged" / HEADS_FILE)
    with pytest.raises(OmniMemError, match=words) as error:
        StreamingSession.from_pretrained(tmp_path / "merged")
    assert "\n" not in str(error.value)


def test_heads_of_another_form_are_one_line(run):
    with pytest.raises(OmniMemError, match=r"heads of another form, for example layers\.0\.inner\.bias"):
        StreamingSession.from_pretrained(run, head_hidden_size=3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("lora.r=0",), "leaves nothing to train"),
        ((*ALONE, "lora.modules_to_save=[audio]"), "needs lora.r above 0"),
        ((*HEADS, "selection.gradient=none"), "trains its heads through selection.gradient"),
        ((*HEADS, "selection.sketch_bits=3"), "sketch_bits must be 4 or 8"),
    ],
)
def test_settings_that_cannot_train_are_one_line(tmp_path, capsys, overrides, words):
    assert words in refused(arguments(tmp_path, *overrides), capsys)
