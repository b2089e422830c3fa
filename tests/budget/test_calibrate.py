"""Calibrated budgets: the allocation equals the formula to the token, and its statistics are measured exactly."""

from __future__ import annotations

import json
import math
import random
import shutil
from fractions import Fraction

import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import omnimem.calibrate
from clips import MEDIA, RABBIT, WEBB
from omnimem.backbones import load_backbone
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.budget.allocation import allocate, rescale, round_to_sum, with_mean
from omnimem.budget.statistics import Compressibility, LayerStatistics
from omnimem.calibrate import calibrate, measure_clip, profile_from
from omnimem.cli import main
from omnimem.errors import OmniMemError
from omnimem.memory.token_bytes import resident_bytes, token_bytes_of
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import build_selection
from omnimem.stream_settings import StreamSettings

SETTINGS = StreamSettings(chunk_seconds=4, max_seconds=8)
FLOWER = MEDIA / "silent_track_flower_timelapse_5s.webm"


def layer(visual: float, audio: float, both: float) -> LayerStatistics:
    """A layer with these compressibilities."""
    return LayerStatistics(*(Compressibility(value, 0.0, 100.0) for value in (visual, audio, both)))


def random_layers(seed: int, count: int, least: float = 0.05, most: float = 0.95) -> list[LayerStatistics]:
    draw = random.Random(seed)
    return [layer(*(draw.uniform(least, most) for _ in range(3))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ratio", "temperature"), [(5.0, 0.2), (2.0, 0.2), (20.0, 1.0)])
def test_allocation_equals_the_rounded_formula(seed, ratio, temperature):
    # Similar enough that no budget is at the floor.
    layers, mean = random_layers(seed, 12, 0.3, 0.7), 4000
    budgets = allocate(layers, mean, ratio, temperature)
    assert all(min(budget.visual, budget.audio) > 16 for budget in budgets)
    weights = [math.exp(one.both.value / temperature) for one in layers]
    for one, weight, budget in zip(layers, weights, budgets, strict=True):
        share = weight / sum(weights) * len(layers) * mean
        visual = ratio * one.visual.value / (ratio * one.visual.value + one.audio.value)
        # The largest-remainder method changes a number by less than one.
        assert abs(budget.visual - share * visual) < 1 and abs(budget.audio - share * (1 - visual)) < 1


def any_layer(draw: random.Random, kind: str) -> LayerStatistics:
    """Possible statistics: usual, equal to others, without audio, or at the ends of the range."""
    if kind == "mixed":
        kind = draw.choice(["usual", "equal", "silent", "extreme"])
    if kind == "equal":
        return layer(0.4, 0.4, 0.4)
    if kind == "silent":
        visual = draw.uniform(0.05, 0.95)
        return layer(visual, 0.0, visual)
    if kind == "extreme":
        return layer(*(draw.choice([0.0, 5e-324, 1e-300, 1e-12, 0.5, 1.0, 2.0]) for _ in range(3)))
    return layer(*(draw.uniform(0.05, 0.95) for _ in range(3)))


@pytest.mark.parametrize("spare", [0, 1, 2, 7, 1000], ids=lambda spare: f"{spare} a layer above the floors")
@pytest.mark.parametrize("floor", [1, 16, 40, 4096])
def test_budgets_sum_exactly_and_keep_their_floor(floor, spare):
    draw = random.Random(1000 * floor + spare)
    for _ in range(40):
        kind = draw.choice(["usual", "mixed"])
        layers = [any_layer(draw, kind) for _ in range(draw.choice([1, 2, 3, 28]))]
        ratio, temperature = 5.0, 0.2
        if draw.random() < 0.5:
            ratio = draw.choice([5e-324, 1e-9, 0.1, 1.0, 1e9, 1.7e308])
            temperature = draw.choice([5e-324, 1e-3, 0.2, 5.0, 1e308])
        mean = 2 * floor + spare
        budgets = allocate(layers, mean, ratio, temperature, floor)
        rescaled = rescale(budgets, mean + 1, floor)
        for found, expected in ((budgets, mean), (rescaled, mean + 1), (rescale(rescaled, mean, floor), mean)):
            assert sum(one.total for one in found) == len(layers) * expected
            assert min(min(one.visual, one.audio) for one in found) >= floor


def test_layers_that_are_hard_to_compress_get_more():
    budgets = allocate([layer(0.5, 0.5, 0.2), layer(0.5, 0.5, 0.4), layer(0.9, 0.1, 0.4)], 1000, ratio=1.0)
    assert budgets[0].total < budgets[1].total == budgets[2].total
    assert budgets[0].visual == budgets[0].audio and budgets[2].visual > 8 * budgets[2].audio
    assert len({budget.total for budget in allocate(random_layers(3, 6), 1000, temperature=1e6)}) <= 2


def test_a_modality_that_never_occurred_gets_the_floor():
    none = Compressibility(0.0, 0.0, 0.0)
    silent = LayerStatistics(Compressibility(0.9, 0.5, 50), none, Compressibility(0.9, 0.5, 50))
    assert allocate([silent, silent], 100) == (LayerBudget(84, 16), LayerBudget(84, 16))


def test_redundancy_above_one_counts_as_one():
    """A mean cosine of float32 states may exceed 1 by an ulp."""
    repeated = Compressibility(entropy=0.9, redundancy=1 + 1e-7, count=50)
    assert repeated.value == 0.0
    still = LayerStatistics(repeated, Compressibility(0.5, 0.5, 50), repeated)
    assert allocate([still], 100) == (LayerBudget(16, 84),)


@pytest.mark.parametrize("ratio", [5e-324, 1.0, 1.7e308])
def test_a_layer_without_compressibility_is_split_by_the_ratio(ratio):
    (budget,) = allocate([layer(0.0, 0.0, 0.0)], 100, ratio)
    assert budget == {5e-324: LayerBudget(16, 84), 1.0: LayerBudget(50, 50), 1.7e308: LayerBudget(84, 16)}[ratio]


def test_rounding_gives_the_rest_to_the_largest_remainders():
    # In proportion: 1.2, 2.9, 3.1, 1.8; and 1.2, 2.5, 3.3.
    assert round_to_sum([12, 29, 31, 18], 9, 1) == [1, 3, 3, 2]
    assert round_to_sum([12, 25, 33], 7, 1) == [1, 3, 3]
    draw = random.Random(0)
    for _ in range(200):
        weights = [draw.randint(50, 1000) for _ in range(draw.randint(1, 12))]
        total = draw.randint(25 * len(weights), 1000)
        exact = [Fraction(weight * total, sum(weights)) for weight in weights]
        if min(exact) < 1:
            continue
        found = round_to_sum(weights, total, 1)
        assert sum(found) == total and all(
            number in (int(one), int(one) + 1) for number, one in zip(found, exact, strict=True)
        )
        up = [one % 1 for number, one in zip(found, exact, strict=True) if number > one]
        down = [one % 1 for number, one in zip(found, exact, strict=True) if number <= one]
        assert not up or not down or min(up) >= max(down)


def test_rounding_keeps_the_floor_and_breaks_ties_by_order():
    assert round_to_sum([1, 1, 1], 10, 1) == [4, 3, 3]
    assert round_to_sum([0, 1, 3], 12, 2) == [2, 3, 7]
    assert round_to_sum([Fraction(1e-9), Fraction(1e-9), 1], 10, 3) == [3, 3, 4]


def test_rescaling_keeps_the_distribution_and_the_sum():
    published = (LayerBudget(15376, 3193), LayerBudget(11107, 2262), LayerBudget(2060, 737))
    for mean in (512, 4096, 50_000):
        budgets = rescale(published, mean)
        assert sum(budget.total for budget in budgets) == 3 * mean
        assert budgets[0].visual > budgets[1].visual > budgets[2].visual
    with pytest.raises(OmniMemError, match="below the minimum"):
        rescale(published, 20)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mean_budget": 31}, "below the minimum of 16 tokens"),
        ({"mean_budget": 100, "ratio": 0.0}, "above 0"),
        ({"mean_budget": 100, "temperature": math.nan}, "above 0"),
        ({"mean_budget": 100, "floor": 0}, "at least 1"),
    ],
)
def test_impossible_allocations_are_refused(options, reason):
    with pytest.raises(OmniMemError, match=reason):
        allocate(random_layers(0, 3), **options)


# ---- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_statistics_equal_those_of_the_transformers_model(tiny64, tiny_path):
    """Entropy and redundancy computed with plain loops from the attention weights and hidden states of transformers."""
    measured = measure_clip(tiny64, FLOWER, SETTINGS)
    reader, encoder = SETTINGS.open(FLOWER, tiny64)
    inputs = encoder.prefix()
    text = len(inputs)
    for chunk in reader:
        inputs = inputs + encoder.encode(chunk)
    reference = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        tiny_path, dtype=torch.float64, attn_implementation="eager"
    )
    outputs = reference.model.language_model(
        inputs_embeds=inputs.embeds,
        position_ids=inputs.position_ids,
        output_attentions=True,
        output_hidden_states=True,
    )
    modality = inputs.modality[0].tolist()
    for number, found in enumerate(measured):
        mass = outputs.attentions[number][0].mean(0)[text:].sum(0).tolist()
        unit = torch.nn.functional.normalize(outputs.hidden_states[number][0], dim=-1)
        for name, kinds in {"visual": [VISUAL], "audio": [AUDIO], "both": [VISUAL, AUDIO]}.items():
            members = [k for k, kind in enumerate(modality) if kind in kinds]
            total = sum(mass[k] for k in members)
            entropy = -sum(mass[k] / total * math.log(mass[k] / total) for k in members) / math.log(len(members))
            cosine = [
                sum(float(unit[k] @ unit[j]) if 0 <= j < len(unit) else 1.0 for j in (k - 1, k + 1)) / 2
                for k in members
            ]
            assert found[name]["count"] == len(members)
            assert found[name]["entropy"] == pytest.approx(entropy, abs=1e-9)
            assert found[name]["redundancy"] == pytest.approx(sum(cosine) / len(cosine), abs=1e-9)


def test_an_interrupted_calibration_resumes(tiny, tmp_path, monkeypatch):
    partial = tmp_path / "profile.json.partial"
    whole = list(calibrate(tiny, [FLOWER, RABBIT, WEBB], SETTINGS, tmp_path / "other"))
    stopped = calibrate(tiny, [FLOWER, RABBIT, WEBB], SETTINGS, partial)
    next(stopped), next(stopped)
    stopped.close()
    streamed = []
    genuine = omnimem.calibrate.measure_clip
    monkeypatch.setattr(
        omnimem.calibrate, "measure_clip", lambda *args: streamed.append(args[1].name) or genuine(*args)
    )
    assert list(calibrate(tiny, [FLOWER, RABBIT, WEBB], SETTINGS, partial)) == whole
    assert streamed == [WEBB.name]
    # Results are not reused with other settings.
    list(calibrate(tiny, [FLOWER], StreamSettings(chunk_seconds=2, max_seconds=4), partial))
    assert streamed[-1] == FLOWER.name


def test_profile_records_its_origin_and_depends_on_the_set_not_its_order(tiny, tmp_path):
    clips = [clip for clip in calibrate(tiny, [FLOWER, RABBIT], SETTINGS, tmp_path / "partial") if clip]
    profile = profile_from(tiny, clips, SETTINGS, 200, selection={"method": "omnimem"})
    assert profile == profile_from(tiny, clips[::-1], SETTINGS, 200, selection={"method": "omnimem"})
    assert profile.calibration_set != profile_from(tiny, clips[:1], SETTINGS, 200).calibration_set
    profile.save(tmp_path / "profile.json")
    loaded = BudgetProfile.load(tmp_path / "profile.json")
    assert loaded == profile and loaded.source == "calibrated" and loaded.mean_budget == 200
    assert loaded.statistics["clips"] == 2 and len(loaded.statistics["layers"]) == len(loaded.layers)
    assert with_mean(loaded, 200) == loaded and with_mean(loaded, 100).mean_budget == 100


def test_the_command_from_media_to_figure(tiny_path, tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    shutil.copy(FLOWER, media)
    shutil.copy(MEDIA / "broken_truncated_no_moov_nasa.mp4", media)
    out = tmp_path / "profile.json"
    options = ["--mean-budget", "120", "--chunk-seconds", "4", "--max-seconds", "4"]
    assert main(["calibrate", "--model", str(tiny_path), "--media", str(media), "--out", str(out), *options]) == 0
    assert "120 tokens per layer, from 1 clips" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["media", "profile.json"]
    assert main(["profile", "show", str(out)]) == 0
    assert "visual H" in capsys.readouterr().out
    assert main(["profile", "rescale", str(out), str(tmp_path / "small.json"), "--mean-budget", "60"]) == 0
    assert main(["profile", "diff", str(out), str(tmp_path / "small.json")]) == 0
    assert "mean budget: 120 and 60" in capsys.readouterr().out
    for name in ("figure.png", "figure.svg"):
        assert main(["profile", "plot", str(out), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 5000
    answer = ["answer", str(tiny_path), str(FLOWER), "What is seen?", "--profile", str(out), "--json"]
    capsys.readouterr()
    assert main([*answer, "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_budget"] == 120


def test_a_number_of_gib_sets_the_size_of_a_calibrated_profile(tiny_path, tmp_path, capsys):
    out, small, gib = tmp_path / "profile.json", tmp_path / "small.json", 0.0003
    media = tmp_path / "media"
    media.mkdir()
    shutil.copy(FLOWER, media)
    given = ["--media", str(media), "--out", str(out), "--chunk-seconds", "4", "--max-seconds", "4"]
    assert main(["calibrate", "--model", str(tiny_path), *given, "--gib", f"{gib}", "--dtype", "float32"]) == 0
    backbone = load_backbone(tiny_path, dtype="float32", device="meta")
    token = token_bytes_of(backbone, build_selection("omnimem"))
    profile = BudgetProfile.load(out)
    room = gib * 2**30 - resident_bytes(profile, token)
    assert 0 <= room < len(profile.layers) * token.total
    model = ["--model", str(tiny_path), "--dtype", "float32"]
    assert main(["profile", "rescale", str(out), str(small), "--gib", f"{gib / 2}", *model]) == 0
    scaled = BudgetProfile.load(small)
    assert scaled == with_mean(profile, round(scaled.mean_budget))
    assert resident_bytes(scaled, token) <= gib / 2 * 2**30 < resident_bytes(scaled, token) * 1.05
    capsys.readouterr()
    assert main(["profile", "show", str(small), *model]) == 0
    shown = capsys.readouterr().out
    assert "features 256, metadata 38, attention scores 4" in shown and "MiB" in shown.splitlines()[0]
    assert main(["profile", "rescale", str(out), str(small), "--gib", "1e-6", *model]) == 2
    assert "the minimum is 32 tokens" in capsys.readouterr().err
    assert main(["profile", "rescale", str(out), str(small), "--gib", "1"]) == 2
    assert "--gib needs --model" in capsys.readouterr().err


def test_nothing_to_calibrate_on(tiny_path, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no media here")
    assert main(["calibrate", "--model", str(tiny_path), "--media", str(tmp_path), "--out", "x.json"]) == 2
    assert "no clip could be read" in capsys.readouterr().err
