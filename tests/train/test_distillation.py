"""Distillation: the same model with a full cache teaches the answers to the model with the compressed cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.recipe import DistillConfig, load_recipe
from omnimem.selection import build_selection
from small_runs import adapter, arguments, main, metrics, trained_run
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import tokenize_row
from train.setup import add_lora, build_tiny_base, load_base, selection_method, stream_settings

AMPLE, SMALL = LayerBudget(2000, 2000), LayerBudget(8, 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny model in float64 with a random adapter, and the two clips of the small runs."""
    folder = tmp_path_factory.mktemp("distillation")
    recipe = load_recipe(arguments(folder, "model.dtype=float64"))
    build_tiny_base(recipe, folder / "run")
    backbone = load_base(recipe, folder / "run", torch.device("cpu"))
    model = add_lora(recipe, backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data).rows]
    return recipe, backbone, model, samples


def outcome(bench, budget: LayerBudget, distill: DistillConfig | None, batch: slice = slice(0, 1)):
    recipe, backbone, model, samples = bench
    objective = StreamObjective(
        backbone,
        model,
        BudgetProfile((budget,) * 3),
        selection_method(recipe),
        stream_settings(recipe),
        distill=distill,
    )
    return objective(samples[batch])


def gradients(bench, result) -> list[torch.Tensor]:
    parameters = [parameter for parameter in bench[2].parameters() if parameter.requires_grad]
    bench[2].zero_grad()
    result.backward(1.0)
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("batch", [slice(0, 1), slice(0, 2)], ids=["one", "two"])
def test_a_teacher_with_the_same_cache_has_no_divergence(bench, batch):
    """With a budget that holds the stream and the same adapter, student and teacher agree, and so do gradients."""
    plain = outcome(bench, AMPLE, None, batch)
    distilled = outcome(bench, AMPLE, DistillConfig(weight=3.0, teacher_adapter=True), batch)
    assert distilled.distillation_loss.abs() <= 1e-10
    assert abs((distilled.loss - plain.loss).item()) <= 1e-10
    for one, other in zip(gradients(bench, plain), gradients(bench, distilled), strict=True):
        assert (one - other).abs().max() <= 1e-8


@pytest.mark.parametrize("temperature", [2.5, pytest.param(1.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_divergence_equals_that_of_two_separate_streams(bench, temperature, with_adapter):
    recipe, backbone, model, samples = bench
    sample = samples[0]
    distilled = outcome(bench, SMALL, DistillConfig(weight=0.5, temperature=temperature, teacher_adapter=with_adapter))
    plain = outcome(bench, SMALL, None)

    def answers(method: str, budget: LayerBudget) -> torch.Tensor:
        reader, encoder = stream_settings(recipe).open(sample.row.media, backbone)
        stream = Stream(backbone, CompressedCache(BudgetProfile((budget,) * 3), build_selection(method)))
        stream.forward(encoder.prefix(), text=True)
        for chunk in reader:
            stream.step(encoder.encode(chunk))
        (asked,) = sample.questions
        return stream.answer_logits(encoder.closing(), [asked.question], [asked.answer])[0]

    with torch.no_grad():
        student = answers("omnimem", SMALL)
        if with_adapter:
            teacher = answers("full", SMALL)
        else:
            with model.disable_adapter():
                teacher = answers("full", SMALL)
    p = F.softmax(teacher / temperature, -1)
    q = F.softmax(student / temperature, -1)
    expected = (p * (p.log() - q.log())).sum() * temperature**2
    assert distilled.distillation_loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert distilled.loss.item() == pytest.approx(plain.loss.item() + 0.5 * expected.item(), rel=1e-9)
    assert expected > 1e-6


def test_the_teacher_does_not_change_the_adapter(bench):
    _, _, model, _ = bench
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    result = outcome(bench, SMALL, DistillConfig(weight=1.0))
    gradients(bench, result)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_distilled_run_logs_its_divergence_and_trains_another_adapter(tmp_path):
    plain = trained_run(tmp_path, out="plain")
    distilled = trained_run(tmp_path, "distill.weight=1.0", out="distilled")
    assert [record["distillation_loss"] for record in metrics(plain)] == [None] * 4
    divergences = [record["distillation_loss"] for record in metrics(distilled)]
    assert all(value > 0 for value in divergences)
    first = metrics(distilled)[0]
    assert first["loss"] == pytest.approx(metrics(plain)[0]["loss"] + first["distillation_loss"], rel=1e-5)
    assert any(not torch.equal(one, adapter(distilled)[name]) for name, one in adapter(plain).items())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.weight=-1", "distill.weight must be at least 0"),
        ("distill.temperature=0", "distill.temperature must be above 0"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, override, words):
    assert main(arguments(tmp_path, override)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_logits_of_the_teacher_are_computed_once(tmp_path, monkeypatch):
    """The same bits with an empty cache, a filled one and none; with a filled one the teacher does not run."""
    cache = f"distill.cache_dir={tmp_path / 'teacher'}"
    settings = ("distill.weight=1.0", "train.max_steps=3", "train.per_device_train_batch_size=2")
    none = trained_run(tmp_path, *settings, out="none")
    cold = trained_run(tmp_path, *settings, cache, out="cold")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    assert len(files) == 3, "one file per question"

    def never(*_):
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr("train.objective.Full", never)
    warm = trained_run(tmp_path, *settings, cache, out="warm")
    for run in (cold, warm):
        assert all(torch.equal(value, adapter(run)[name]) for name, value in adapter(none).items())
        assert [r["distillation_loss"] for r in metrics(run)] == [r["distillation_loss"] for r in metrics(none)]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}


@pytest.mark.long
def test_other_settings_have_other_cached_logits(tmp_path):
    """The file name is a hash of everything the logits depend on; damaged files are replaced."""
    settings = ("distill.weight=1.0", "train.max_steps=2", f"distill.cache_dir={tmp_path / 'teacher'}")
    one = trained_run(tmp_path, *settings, out="one")
    count = len(list((tmp_path / "teacher").iterdir()))
    trained_run(tmp_path, *settings, "model.seed=1", out="seed")
    trained_run(tmp_path, *settings, "data.chunk_seconds=4", out="chunks")
    assert len(list((tmp_path / "teacher").iterdir())) == 3 * count
    for path in (tmp_path / "teacher").iterdir():
        path.write_bytes(b"half")
    again = trained_run(tmp_path, *settings, out="again")
    assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(one).items())


def test_logits_of_a_changing_teacher_are_not_cached(tmp_path, capsys):
    assert main(arguments(tmp_path, "distill.teacher_adapter=true", "distill.cache_dir=teacher")) == 2
    assert "distill.cache_dir" in capsys.readouterr().err
