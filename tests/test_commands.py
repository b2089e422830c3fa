"""`omnimem train`, `omnimem recipes`, `omnimem methods`: the command line, and detection of backbones."""

from __future__ import annotations

import pytest

from omnimem.backbones import BACKBONES, backbone_class, detect_backbone
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.recipe import Recipe, list_recipes, load_recipe
from omnimem.selection import SELECTION_METHODS, build_selection, options_of
from omnimem.selection.listing import default_options
from small_runs import adapter, arguments, main, metrics

# ---- commands --------------------------------------------------------------------------------------------------------


def test_omnimem_train_is_train_py(tmp_path):
    quick = ("train.max_steps=1", "train.save_steps=1")
    assert main(arguments(tmp_path, *quick, out="script")) == 0
    assert omnimem(["train", *arguments(tmp_path, *quick, out="command")]) == 0
    script, command = (adapter(tmp_path / out) for out in ("script", "command"))
    assert script.keys() == command.keys() and all(script[name].equal(command[name]) for name in script)


@pytest.mark.parametrize("args", [["train", "recipe=nosuch"], ["--debug", "train", "recipe=nosuch"]])
def test_omnimem_train_refuses_what_train_py_refuses(args, capsys):
    assert omnimem(args) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("train: unknown recipe 'nosuch'")
    assert ("Traceback" in error) == ("--debug" in args)


def test_help_of_omnimem_train_is_that_of_train_py(capsys):
    assert omnimem(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert "key=value" in told and all(name in told for name in list_recipes())


def test_recipes_lists_every_recipe_with_one_line(capsys):
    assert omnimem(["recipes"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list_recipes()
    for row in rows:
        assert 20 < len(row.split(maxsplit=1)[1]) <= 120, row


def test_methods_lists_every_method_with_its_options(capsys):
    assert omnimem(["methods"]) == 0
    told = capsys.readouterr().out
    named = [line.split()[0] for line in told.splitlines() if line and not line.startswith((" ", "In a recipe"))]
    assert named == list(SELECTION_METHODS)
    assert "lambda=0.02" in told and "window_size=32" in told and "position_ids=compact" in told


@pytest.mark.parametrize("name", SELECTION_METHODS)
def test_options_are_listed_with_their_defaults(name):
    options = default_options(name)
    assert set(options) == options_of(name)
    assert build_selection(name, **options).recorded() == build_selection(name).recorded()


# ---- defaults --------------------------------------------------------------------------------------------------------


def test_the_selection_is_trained_by_default_and_in_every_recipe_but_the_papers_own():
    assert Recipe().selection.gradient == "straight_through"
    forms = {name: load_recipe([f"recipe={name}"]).selection.gradient for name in list_recipes()}
    assert forms.pop("release_sft") == "none"
    assert set(forms.values()) == {"straight_through"}


def test_a_method_without_a_gradient_says_how_to_train_with_it(tmp_path, capsys):
    args = arguments(tmp_path, "selection.method=h2o", "dry_run=true")
    assert main(args) == 2
    assert "selection.gradient=none" in capsys.readouterr().err
    assert main([*args, "selection.gradient=none"]) == 0


# ---- backbones -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint of every backbone, in the published layout."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {name: backbone_class(name).build_tiny(base / name) for name in BACKBONES}


def test_every_backbone_is_detected_from_its_checkpoint(folders):
    assert {name: detect_backbone(folder) for name, folder in folders.items()} == {name: name for name in BACKBONES}


def test_every_other_backbone_contradicts_a_checkpoint(folders):
    for name, folder in folders.items():
        for other in BACKBONES:
            if other != name:
                with pytest.raises(
                    OmniMemError, match=f"model.backbone={other} contradicts .* a checkpoint of {name};"
                ):
                    detect_backbone(folder, other)


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_contradiction_ends_a_run_and_a_dry_run(tmp_path, folders, capsys, dry_run):
    args = [f"model.name_or_path={folders['qwen3_vl']}", "model.backbone=qwen2_5_omni", f"dry_run={dry_run}"]
    assert main(arguments(tmp_path, *args)) == 2
    assert "contradicts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_published_model_is_known_by_its_hub_id_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert detect_backbone("Qwen/Qwen3-VL-8B-Instruct", use_builtin_config=True) == "qwen3_vl"
    with pytest.raises(OmniMemError, match="a checkpoint of qwen3_vl"):
        detect_backbone("Qwen/Qwen3-VL-8B-Instruct", "qwen2_5_vl", use_builtin_config=True)


def test_a_run_detects_the_backbone_of_its_checkpoint(tmp_path, folders):
    options = (
        f"model.name_or_path={folders['qwen3_vl']}",
        "train.max_steps=1",
        "train.save_steps=1",
        "data.chunk_seconds=4",
    )
    assert main(arguments(tmp_path, *options)) == 0
    assert load_recipe([f"recipe={tmp_path / 'run' / 'recipe.yaml'}"]).model.backbone == "qwen3_vl"
    assert metrics(tmp_path / "run")[0]["retained"]["audio"] == 0, "Qwen3-VL takes no audio"
    # The recorded backbone does not count as a change of the recipe.
    assert main(arguments(tmp_path, *options, "train.max_steps=2")) == 0
