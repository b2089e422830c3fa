"""Distillation: the same model with everything in view teaches what the small memory should have answered."""

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
from train.data import load_rows, tokenise
from train.objective import StreamObjective
from train.setup import add_lora, build_base, load_base, selection_of, settings_of

AMPLE, SMALL = LayerBudget(2000, 2000), LayerBudget(8, 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny model in float64 whose adapter has been disturbed, and the two clips of the small runs."""
    folder = tmp_path_factory.mktemp("distillation")
    recipe = load_recipe(arguments(folder, "model.dtype=float64"))
    build_base(recipe, folder / "run")
    backbone = load_base(recipe, folder / "run", torch.device("cpu"))
    model = add_lora(recipe, backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    samples = [tokenise(row, backbone) for row in load_rows(recipe.data).rows]
    return recipe, backbone, model, samples


def outcome(bench, budget: LayerBudget, distill: DistillConfig | None, batch: slice = slice(0, 1)):
    recipe, backbone, model, samples = bench
    objective = StreamObjective(
        backbone,
        model,
        BudgetProfile((budget,) * 3),
        selection_of(recipe),
        settings_of(recipe),
        distill=distill,
    )
    return objective(samples[batch])


def gradients(bench, result) -> list[torch.Tensor]:
    parameters = [parameter for parameter in bench[2].parameters() if parameter.requires_grad]
    bench[2].zero_grad()
    result.backward(1.0)
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("batch", [slice(0, 1), slice(0, 2)], ids=["one", "two"])
def test_a_teacher_that_sees_the_same_has_nothing_to_teach(bench, batch):
    """With room for everything and the same adapter, student and teacher are one, and so is the gradient."""
    plain = outcome(bench, AMPLE, None, batch)
    taught = outcome(bench, AMPLE, DistillConfig(weight=3.0, teacher_adapter=True), batch)
    assert taught.distilled.abs() <= 1e-10
    assert abs((taught.loss - plain.loss).item()) <= 1e-10
    for one, other in zip(gradients(bench, plain), gradients(bench, taught), strict=True):
        assert (one - other).abs().max() <= 1e-8


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_divergence_is_that_of_two_separate_streams(bench, temperature, with_adapter):
    recipe, backbone, model, samples = bench
    sample = samples[0]
    taught = outcome(bench, SMALL, DistillConfig(weight=0.5, temperature=temperature, teacher_adapter=with_adapter))
    plain = outcome(bench, SMALL, None)

    def answers(method: str, budget: LayerBudget) -> torch.Tensor:
        reader, encoder = settings_of(recipe).open(sample.row.media, backbone)
        stream = Stream(backbone, CompressedCache(BudgetProfile((budget,) * 3), build_selection(method)))
        stream.forward(encoder.prefix(), text=True)
        for chunk in reader:
            stream.step(encoder.encode(chunk))
        (asked,) = sample.asked
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
    assert taught.distilled.item() == pytest.approx(expected.item(), rel=1e-9)
    assert taught.loss.item() == pytest.approx(plain.loss.item() + 0.5 * expected.item(), rel=1e-9)
    assert expected > 1e-6


def test_the_teacher_leaves_the_adapter_as_it_was(bench):
    _, _, model, _ = bench
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    result = outcome(bench, SMALL, DistillConfig(weight=1.0))
    gradients(bench, result)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_distilled_run_logs_its_divergence_and_learns_otherwise(tmp_path):
    plain = trained_run(tmp_path, out="plain")
    taught = trained_run(tmp_path, "distill.weight=1.0", out="taught")
    assert [record["distilled"] for record in metrics(plain)] == [None] * 4
    distilled = [record["distilled"] for record in metrics(taught)]
    assert all(value > 0 for value in distilled)
    first = metrics(taught)[0]
    assert first["loss"] == pytest.approx(metrics(plain)[0]["loss"] + first["distilled"], rel=1e-5)
    assert any(not torch.equal(one, adapter(taught)[name]) for name, one in adapter(plain).items())


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


def test_answers_of_the_teacher_are_given_once(tmp_path, monkeypatch):
    """The same bits with a cold folder, a warm one and none; a warm one spares the teacher's stream altogether."""
    cache = f"distill.cache_dir={tmp_path / 'teacher'}"
    settings = ("distill.weight=1.0", "train.max_steps=3", "train.per_device_train_batch_size=2")
    none = trained_run(tmp_path, *settings, out="none")
    cold = trained_run(tmp_path, *settings, cache, out="cold")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    assert len(files) == 3, "one file a question"

    def never(*_):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("train.objective.Full", never)
    warm = trained_run(tmp_path, *settings, cache, out="warm")
    for run in (cold, warm):
        assert all(torch.equal(value, adapter(run)[name]) for name, value in adapter(none).items())
        assert [r["distilled"] for r in metrics(run)] == [r["distilled"] for r in metrics(none)]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}


def test_other_settings_have_other_answers(tmp_path):
    """What the answers depend on is in the name of the file, and a damaged one is given again."""
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


def test_answers_that_change_are_not_kept(tmp_path, capsys):
    assert main(arguments(tmp_path, "distill.teacher_adapter=true", "distill.cache_dir=teacher")) == 2
    assert "distill.cache_dir" in capsys.readouterr().err
