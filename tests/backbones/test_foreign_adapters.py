"""Adapters as the authors' code and older libraries save them: every weight finds its place, or is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from omnimem.backbones import backbone_class, load_backbone
from omnimem.backbones.adapter import load_adapter, modules_to_save
from omnimem.backbones.qwen2_5_vl.tiny import hub_name
from omnimem.backbones.video_salmonn2 import keys
from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from train.export import export_run

SALMONN = "video_salmonn2_qwen2_5"
FAMILIES = [SALMONN, "video_salmonn2", "qwen2_5_vl", "qwen3_vl"]
RANK = 4


def published(family: str, name: str) -> str:
    """Name of a weight in the published checkpoint of a family."""
    if "salmonn" in family:
        name = keys.published(name, "audio." if family == SALMONN else "model.audio.")
    return hub_name(name) if "qwen2_5" in family else name


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory) -> Path:
    return backbone_class(family).build_tiny(tmp_path_factory.mktemp("models") / family)


@pytest.fixture
def foreign(family, base, tmp_path) -> Path:
    """LoRA on q, k, v by bare names, projectors whole, a base that is somebody's private folder."""
    model = load_backbone(base, dtype="float32", device="cpu").model
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in model.named_modules():
        if "language_model.layers" in name and name.endswith(("q_proj", "k_proj", "v_proj")):
            old = f"base_model.model.{published(family, name + '.')}"
            weights[f"{old}lora_A.weight"] = 0.05 * torch.randn(RANK, module.in_features, generator=generator)
            weights[f"{old}lora_B.weight"] = 0.05 * torch.randn(module.out_features, RANK, generator=generator)
    whole = ("visual.merger.", "audio.connector.") if "salmonn" in family else ()
    for name, weight in model.state_dict().items():
        if any(f".{module}" in name for module in whole) and not name.endswith("q_tokens"):
            weights[f"base_model.model.{published(family, name)}"] = weight + 0.5
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/private/checkpoints/base",
        "r": RANK,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "modules_to_save": ["visual.merger", "audio.qformer", "audio.q_tokens", "audio.audio_proj"] if whole else None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_every_weight_finds_its_place_and_no_encoder_is_adapted(family, base, foreign):
    backbone = load_backbone(base, dtype="float32", device="cpu")
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    model = load_adapter(backbone, foreign)
    saved = load_file(foreign / "adapter_model.safetensors")
    adapted = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(adapted) == 3 * len(backbone.language_model.layers)
    for name, module in adapted.items():
        assert "language_model.layers" in name
        old = f"base_model.model.{published(family, name + '.')}"
        assert torch.equal(module.lora_A["default"].weight, saved[f"{old}lora_A.weight"])
        assert torch.equal(module.lora_B["default"].weight, saved[f"{old}lora_B.weight"])
    replaced = {n.removeprefix("base_model.model."): m for n, m in modules_to_save(model).items()}
    assert set(replaced) == ({"model.visual.merger", "model.audio.connector"} if "salmonn" in family else set())
    for name, module in replaced.items():
        for inner, weight in module.state_dict().items():
            # The bare parameter is not among the modules that PEFT saves: it is the base's.
            added = 0.0 if inner == "q_tokens" else 0.5
            assert torch.equal(weight, before[f"{name}.{inner}"] + added)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_foreign_adapter_merges_into_the_base_that_is_given(family, base, foreign, tmp_path_factory, dtype):
    out = tmp_path_factory.mktemp("out") / "merged"
    with pytest.raises(OmniMemError, match="/private/checkpoints/base"):
        export_run(foreign, out, dtype=dtype)
    checked = export_run(foreign, out, base=base, dtype=dtype)
    assert checked.difference == 0 < checked.rounding
    assert BudgetProfile.load(out / PROFILE_FILE).mean_budget == 8192
    assert load_backbone(out, device="cpu").name == family


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_it_is_exported_as_the_base_is_published(family, base, foreign, tmp_path, key):
    """Without a recipe nothing else says so; on the CPU the default would be twice the size."""
    published = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((published / "config.json").read_text())
    # Hub files of models with a thinker name it there only.
    (config.get("thinker_config", config))[key] = "bfloat16"
    (published / "config.json").write_text(json.dumps(config))
    export_run(foreign, tmp_path / "merged", base=published)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_what_cannot_be_merged_is_named(family, base, foreign, tmp_path):
    """LoRA of the embedding, which is no linear layer."""
    file = foreign / "adapter_model.safetensors"
    table = load_backbone(base, dtype="float32", device="cpu").language_model.get_input_embeddings()
    name = f"base_model.model.{published(family, 'model.language_model.embed_tokens.')}"
    halves = {
        f"{name}lora_embedding_A": torch.ones(RANK, table.num_embeddings),
        f"{name}lora_embedding_B": torch.ones(table.embedding_dim, RANK),
    }
    save_file({**load_file(file), **halves}, file)
    with pytest.raises(OmniMemError, match=r"embed_tokens\.lora_embedding_A cannot be merged"):
        export_run(foreign, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_weight_without_a_place_is_named(family, base, foreign, change):
    file = foreign / "adapter_model.safetensors"
    weights = load_file(file)
    odd = next(key for key in weights if key.endswith("layers.1.self_attn.k_proj.lora_B.weight"))
    weight = weights.pop(odd)
    if change == "unknown":
        weights[odd] = weight
        weights[odd.replace("layers.1.", "layers.77.")] = weight.clone()
    save_file(weights, file)
    with pytest.raises(OmniMemError) as error:
        load_adapter(load_backbone(base, dtype="float32", device="cpu"), foreign)
    assert ("layers.77" if change == "unknown" else "layers.1.self_attn.k_proj") in str(error.value)
    assert "\n" not in str(error.value)
