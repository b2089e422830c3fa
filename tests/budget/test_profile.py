"""A budget profile survives a round trip, refuses invalid content, and does not need torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.budget import BudgetProfile, LayerBudget, ModelFingerprint
from omnimem.errors import OmniMemError

PUBLISHED = "[[1419, 6772], [16, 512], [2048, 18569]]"
"""The published list format: one ``[audio, visual]`` pair per layer."""

FULL = BudgetProfile(
    layers=(LayerBudget(visual=6772, audio=1419), LayerBudget(visual=1, audio=16)),
    model=ModelFingerprint("qwen2_5_omni_text", 2, 4, 128),
    model_id="Qwen/Qwen2.5-Omni-7B",
    selection={"method": "omnimem", "variant": "release", "lambda": 0.02},
    stream={"fps": 1.0, "chunk_seconds": 10.0, "audio": True},
    statistics={"entropy": {"visual": [0.5, 0.25], "audio": [0.1, 1.0]}},
    calibration_set="sha256:0123",
    source="calibrated",
)


def config(layers: int = 2, kv_heads: int = 4, heads: int = 28, hidden: int = 3584, model_type="qwen2_5_omni_text"):
    """The fields a profile reads from a transformers configuration."""
    text = SimpleNamespace(
        model_type=model_type,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        hidden_size=hidden,
    )
    return SimpleNamespace(get_text_config=lambda: text)


def test_saved_and_loaded_profiles_are_equal(tmp_path):
    FULL.save(tmp_path / "profile.json")
    assert BudgetProfile.load(tmp_path / "profile.json") == FULL
    bare = BudgetProfile((LayerBudget(3, 2),))
    bare.save(tmp_path / "bare.json")
    assert BudgetProfile.load(str(tmp_path / "bare.json")) == bare


def test_the_file_names_its_schema_and_version(tmp_path):
    FULL.save(tmp_path / "profile.json")
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["schema"] == "omnimem.budget_profile"
    assert content["version"] == 1
    assert content["omnimem_version"]
    assert content["layers"] == [{"visual": 6772, "audio": 1419}, {"visual": 1, "audio": 16}]
    assert content["mean_budget"] == (6772 + 1419 + 1 + 16) / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json"]


def test_the_published_list_format_is_read_as_audio_then_visual(tmp_path):
    (tmp_path / "8b_8k_r5.json").write_text(PUBLISHED)
    profile = BudgetProfile.load(tmp_path / "8b_8k_r5.json")
    assert profile.layers[0] == LayerBudget(visual=6772, audio=1419)
    assert profile.layers[2].total == 2048 + 18569
    assert profile.source == "published" and profile.model is None


def test_the_published_list_format_is_written_back_number_by_number(tmp_path):
    (tmp_path / "in.json").write_text(PUBLISHED)
    profile = BudgetProfile.load(tmp_path / "in.json")
    assert profile.to_lists() == json.loads(PUBLISHED)
    profile.save_lists(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(PUBLISHED)
    assert BudgetProfile.load(tmp_path / "out.json") == profile


# ---- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visual", "audio"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 8192.0, True, False, "8", None, float("nan")], ids=repr)
def test_a_budget_is_a_whole_number_of_at_least_one(name, value):
    with pytest.raises(OmniMemError, match=rf"layer 1 has .* {name} tokens") as error:
        BudgetProfile((LayerBudget(3, 2), replace(LayerBudget(3, 2), **{name: value})))
    assert "\n" not in str(error.value)


def test_a_profile_without_layers_is_refused():
    with pytest.raises(OmniMemError, match="no layer"):
        BudgetProfile(())


def saved_with(**changes) -> str:
    content = {**FULL.to_dict(), **changes}
    return json.dumps({key: value for key, value in content.items() if value != "REMOVED"})


def nested(depth: int) -> list[str]:
    """Profiles with deeply nested lists."""
    deep = "[" * depth + "]" * depth
    inside = [saved_with(**{name: {"x": "DEEP"}}) for name in ("selection", "statistics", "model")]
    return [deep, f"[[1, {deep}]]", *(text.replace('"DEEP"', deep) for text in inside)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("not json", "JSON"),
        ("[]", "no layer"),
        ("{}", "not a budget profile"),
        ("3", "not a budget profile"),
        ("null", "not a budget profile"),
        ('"profile"', "not a budget profile"),
        (saved_with(schema="other.schema"), "not a budget profile"),
        (saved_with(version=2), "version 2"),
        (saved_with(version=0), "version 0"),
        (saved_with(version="1"), "version '1'"),
        (saved_with(version="REMOVED"), "version None"),
        (saved_with(layers="REMOVED"), "layers"),
        (saved_with(selection="REMOVED"), "selection"),
        (saved_with(statistics="REMOVED"), "statistics"),
        (saved_with(layers=[]), "no layer"),
        (saved_with(layers=3), "layers must be a list"),
        (saved_with(layers=[{"visual": 3}]), "audio"),
        (saved_with(layers=[{"visual": 3, "audio": 2, "text": 9}]), "text"),
        (saved_with(layers=[{"visual": 0, "audio": 2}]), "at least 1"),
        (saved_with(layers=[{"visual": 2.5, "audio": 2}]), "whole number"),
        (saved_with(layers=[{"visual": True, "audio": 2}]), "whole number"),
        (saved_with(layers=[[3, 2]]), "unknown field|mapping"),
        (saved_with(model={"architecture": "x"}), "unknown field|missing"),
        (saved_with(model={"architecture": "x", "layers": 2, "kv_heads": 4, "head_dim": 8, "hidden": 3}), "hidden"),
        (saved_with(budgets=[[1, 2]]), "budgets"),
        ("[[1, 2, 3]]", r"expected \[audio, visual\]"),
        ("[[1, 2], 3]", r"layer 1 is 3"),
        ('["ab"]', r"expected \[audio, visual\]"),
        ("[[1, 2], [0, 2]]", "layer 1 has 0 audio"),
        ("[[1, -2]]", "has -2 visual"),
        ("[[1.0, 2]]", "1.0 audio"),
        ("[[true, 2]]", "True audio"),
        ("[[NaN, 2]]", "JSON"),
        (f"[[{2**40 + 1}, 2]]", "at most 2"),
        (f"[[{'9' * 4000}, 2]]", "at most 2"),
        (f"[[{'9' * 5000}, 2]]", "JSON"),
        (saved_with(model_id=3), "model_id must be a string, got 3"),
        (saved_with(model_id="\ud800"), "JSON"),
        (saved_with(selection=[]), "selection must be an object"),
        (saved_with(selection={"method": ["omnimem"]}), "selection: method must be a single value"),
        (saved_with(stream={"fps": {}}), "stream: fps must be a single value"),
        *((text, "nests|JSON|expected|tokens|single") for depth in (20, 900, 970, 5000) for text in nested(depth)),
    ],
)
def test_invalid_profiles_are_refused_in_one_line_with_the_file_name(tmp_path, content, reason):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(OmniMemError, match=reason) as error:
        BudgetProfile.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def calibrated_with(*place: str | int, value: object = "REMOVED") -> str:
    """A calibrated profile with one field of its statistics replaced or removed."""
    group = {"entropy": 0.5, "redundancy": 0.2, "count": 10.0}
    layers = [{name: dict(group) for name in ("visual", "audio", "both")} for _ in FULL.layers]
    content = FULL.to_dict()
    content["statistics"] = {"method": "avba", "ratio": 5.0, "temperature": 0.2, "floor": 2, "layers": layers}
    inside: Any = content["statistics"]
    for key in place[:-1]:
        inside = inside[key]
    if value == "REMOVED":
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((calibrated_with(name), name) for name in ("ratio", "temperature", "floor", "layers")),
        *((calibrated_with("ratio", value=value), "ratio must be a number") for value in (None, "5", [5], True, 1e301)),
        *((calibrated_with("floor", value=value), "floor must be a whole number") for value in (2.5, "2", {})),
        *((calibrated_with("layers", value=value), "list of 2") for value in ([], {}, 3, "layers", [1])),
        *((calibrated_with("layers", 1, value=value), "layer 1 must be an object") for value in (None, [], {}, "x")),
        (calibrated_with("layers", 0, "audio"), "layer 0 must be an object of visual, audio, both"),
        (calibrated_with("layers", 0, "audio", value=[0.5, 0.2, 10.0]), "layer 0 must be an object"),
        *((calibrated_with("layers", 1, "both", name), f"layer 1, both: {name}") for name in ("entropy", "count")),
        (calibrated_with("layers", 1, "both", "entropy", value="high"), "entropy must be a number, got 'high'"),
        (calibrated_with("layers", 1, "both", "entropy", value=10**400), "entropy must be a number"),
        (calibrated_with("layers", 1, "both", "redundancy", value=float("nan")), "JSON"),
    ],
)  # fmt: skip
def test_statistics_that_cannot_be_allocated_from_are_refused_when_the_profile_is_read(tmp_path, content, reason):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(OmniMemError, match=reason) as error:
        BudgetProfile.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_missing_file_a_folder_and_binary_content_are_refused(tmp_path):
    with pytest.raises(OmniMemError, match="no such budget profile"):
        BudgetProfile.load(tmp_path / "nothing.json")
    with pytest.raises(OmniMemError, match="not a readable JSON"):
        BudgetProfile.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(OmniMemError, match="not a readable JSON"):
        BudgetProfile.load(tmp_path / "binary.json")


# ---- uniform -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "ratio", "visual", "audio"),
    [
        (8192, 5.0, 6827, 1365),
        (8192, 1.0, 4096, 4096),
        (12, 5.0, 10, 2),
        (2, 5.0, 1, 1),
        (2, 0.1, 1, 1),
        (3, 1e9, 2, 1),
    ],
)
def test_uniform_splits_every_layer_the_same(mean, ratio, visual, audio):
    profile = BudgetProfile.uniform(config(layers=5), mean=mean, ratio=ratio, model_id="x")
    assert profile.layers == (LayerBudget(visual=visual, audio=audio),) * 5
    assert profile.mean_budget == mean
    assert profile.source == "uniform" and profile.model_id == "x"
    assert profile.model == ModelFingerprint("qwen2_5_omni_text", 5, 4, 128)


@pytest.mark.parametrize(
    ("mean", "ratio"),
    [(1, 5.0), (0, 5.0), (-5, 5.0), (100, 0), (100, -1.0), (100.5, 5.0), (100, float("nan"))],
)
def test_uniform_refuses_a_mean_below_one_token_per_modality(mean, ratio):
    with pytest.raises(OmniMemError):
        BudgetProfile.uniform(config(), mean=mean, ratio=ratio)


def test_a_model_without_audio_gives_all_but_one_token_to_video():
    profile = BudgetProfile.uniform(config(), mean=96, ratio=float("inf"))
    assert {(layer.visual, layer.audio) for layer in profile.layers} == {(95, 1)}


# ---- agreement with a model ----------------------------------------------------------------------------------------


def test_a_profile_accepts_its_model():
    FULL.check_model(config())
    BudgetProfile.from_lists([[1, 2], [3, 4]]).check_model(config(kv_heads=8))


@pytest.mark.parametrize(
    "other",
    [{"layers": 3}, {"layers": 1}, {"kv_heads": 2}, {"hidden": 28 * 64}, {"model_type": "qwen3_vl_text"}],
    ids=str,
)
def test_a_profile_refuses_another_model(other):
    with pytest.raises(OmniMemError, match="use a profile made for this model") as error:
        FULL.check_model(config(**other))
    assert "\n" not in str(error.value)


def test_published_budgets_refuse_another_number_of_layers():
    with pytest.raises(OmniMemError, match="has 3 layers but the model"):
        BudgetProfile.from_lists(json.loads(PUBLISHED)).check_model(config(layers=36))


def test_the_fingerprint_of_a_model_is_that_of_its_language_model():
    from transformers import Qwen2_5OmniThinkerConfig

    whole = Qwen2_5OmniThinkerConfig()
    assert ModelFingerprint.of(whole) == ModelFingerprint.of(whole.text_config)
    assert ModelFingerprint.of(whole).layers == whole.text_config.num_hidden_layers


def test_a_profile_loads_without_torch(tmp_path):
    FULL.save(tmp_path / "profile.json")
    program = (
        "import sys; from omnimem import BudgetProfile; "
        f"profile = BudgetProfile.load({str(tmp_path / 'profile.json')!r}); "
        f"profile.save({str(tmp_path / 'again.json')!r}); "
        "loaded = {name.split('.')[0] for name in sys.modules}; "
        "assert not loaded & {'torch', 'transformers', 'numpy'}, loaded; print(profile.mean_budget)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == FULL.mean_budget
