"""Recipes: one source of defaults, key=value overrides, and one line for every mistake."""

import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from omnimem.errors import OmniMemError
from omnimem.recipe import Recipe, list_recipes, load_recipe, to_yaml
from omnimem.recipe.parser import RECIPES
from omnimem.recipe.schema import KEY_TYPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe file and return its `recipe=` argument."""

    def write(text=""):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return f"recipe={path}"

    return write


def fails(*args):
    with pytest.raises(OmniMemError) as caught:
        load_recipe(list(args))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_recipe_is_the_defaults(recipe):
    argument = recipe("# nothing differs\n")
    loaded = load_recipe([argument])
    assert loaded == Recipe(recipe=argument.removeprefix("recipe="), output_dir="runs/mine")
    assert type(loaded) is Recipe and type(loaded.train.report_to) is list and type(loaded.lora.target_modules) is list


def test_defaults_are_the_documented_ones(recipe):
    loaded = load_recipe([recipe()])
    assert (loaded.memory.mean_budget, loaded.memory.ratio, loaded.data.fps) == (8192, 5.0, 1.0)
    assert (loaded.lora.r, loaded.lora.lora_alpha, loaded.lora.lora_dropout) == (128, 256, 0.05)
    assert (loaded.train.learning_rate, loaded.train.warmup_ratio, loaded.selection.variant) == (2e-5, 0.03, "paper")


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_parses_and_opens_with_its_launch_line(name):
    loaded = load_recipe([f"recipe={name}"])
    assert (loaded.recipe, loaded.output_dir) == (name, f"runs/{name}")
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert head[0].startswith("# accelerate launch") and f"recipe={name}" in head[0]


def test_shipped_recipes_say_only_known_keys_by_path_too():
    assert "quickstart" in list_recipes()
    by_name, by_path = (
        load_recipe(["recipe=quickstart"]),
        load_recipe([f"recipe={RECIPES / 'quickstart.yaml'}"]),
    )
    assert dataclasses.replace(by_path, recipe="quickstart") == by_name


def test_arguments_override_and_the_last_one_wins(recipe):
    loaded = load_recipe(
        [
            "train.max_steps=3",
            recipe("train: {max_steps: 9, learning_rate: 1}\ndata:\n  time_scale: 2\n"),
            "lora.target_modules=[q_proj,v_proj]",
            "train.learning_rate=1e-4",
            "train.learning_rate=2e-4",
            "output_dir=out/1e5",
            "resume_from_checkpoint=false",
            "data.short_side=null",
            "train={num_train_epochs: 2, adam_beta1: 0.8}",
            "finish.media=clip.mp4",
            "finish.question=Which one: a=b, or [c]? # not a comment",
        ]
    )
    assert (loaded.train.max_steps, loaded.train.learning_rate, loaded.train.num_train_epochs) == (3, 2e-4, 2.0)
    assert loaded.lora.target_modules == ["q_proj", "v_proj"] and loaded.train.adam_beta1 == 0.8
    assert (loaded.output_dir, loaded.resume_from_checkpoint, loaded.data.short_side) == ("out/1e5", False, None)
    assert loaded.finish.question == "Which one: a=b, or [c]? # not a comment"
    assert loaded.data.time_scale == 2.0 and isinstance(loaded.data.time_scale, float)


def test_values_may_refer_to_each_other(recipe):
    loaded = load_recipe([recipe("model: {seed: 7}\ntrain: {seed: '${model.seed}'}\n")])
    assert loaded.train.seed == 7
    assert "data.root: Interpolation key 'nowhere' not found" in fails(recipe(), "data.root=${nowhere}")


def test_float16_is_refused_with_the_supported_types(recipe):
    line = fails(recipe(), "model.dtype=float16")
    assert "model.dtype takes one of float32, bfloat16, float64, got 'float16'" in line


AWKWARD = [
    "1e5",
    "on",
    "{a: b}",
    'it\'s "x" # y: z\\',
    "a${b}",
    "a\\${b}\\",
    "\\\\${x}\\\\${y}",
    "é\n\nz",
    "${",
    "~",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_to_yaml_round_trips(recipe, tmp_path, text):
    loaded = load_recipe([recipe(), "train.learning_rate=1e-5", "data.max_seconds=1e-5", "selection.redundancy=sketch"])
    loaded.finish.question, loaded.finish.media = text, "clip.mp4"
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(loaded), encoding="utf-8")
    assert load_recipe([f"recipe={saved}"]) == loaded
    for key in KEY_TYPES:
        assert re.search(rf"^\s*{key.rpartition('.')[2]}:", saved.read_text(encoding="utf-8"), re.MULTILINE), key


def test_recipe_names():
    known = ", ".join(list_recipes())
    assert fails() == fails("recipe=") == f"no recipe given; pass recipe=NAME, one of: {known}"
    assert f"unknown recipe 'nosuch'; recipes: {known}" in fails("recipe=nosuch")
    assert "unknown recipe 'quikstart'; did you mean recipe=quickstart?" in fails("recipe=quikstart")
    assert "recipe file ./quickstart.yml does not exist; did you mean" in fails("recipe=./quickstart.yml")
    assert "is not a file" in fails(f"recipe={ROOT}")
    assert "argument 'quickstart' is not of the form key=value, such as recipe=quickstart" in fails("quickstart")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("foo", "argument 'foo' is not of the form key=value, such as train.max_steps=100"),
        ("learning_rate=3", "unknown key learning_rate; did you mean train.learning_rate?"),
        ("seed=3", "unknown key seed; did you mean model.seed or selection.seed or train.seed?"),
        ("train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("trian.learning_rate=1", "unknown key trian.learning_rate; did you mean train.learning_rate?"),
        ("--train.learning_rate=1", "unknown key --train.learning_rate; did you mean train.learning_rate?"),
        ("output_dri=x", "unknown key output_dri; did you mean output_dir?"),
        ("lora.target_modules.0=a", "unknown key lora.target_modules.0; did you mean lora.target_modules?"),
        ("lora.zzz=a", "unknown key lora.zzz; lora has r, lora_alpha, lora_dropout, target_modules"),
        ("zzz=[1", "zzz takes something else, cannot read '[1'"),
        ("zzz=1", "unknown key zzz; a recipe has recipe, output_dir, resume_from_checkpoint, dry_run, data,"),
        ("=1", "unknown key ; a recipe has"),
        ("train.max_steps=foo", "train.max_steps takes a whole number or null, got 'foo'"),
        ("train.max_steps=1.5", "train.max_steps takes a whole number or null, got 1.5"),
        ("train.max_steps=true", "train.max_steps takes a whole number or null, got true"),
        ("train.num_train_epochs=null", "train.num_train_epochs takes a number, got null"),
        ("train.learning_rate=[1", "train.learning_rate takes a number, cannot read '[1'"),
        ("train=3", "train is a group of keys such as train.max_steps, got 3"),
        ("data.audio=maybe", "data.audio takes true or false, got 'maybe'"),
        ("data.path=", "data.path takes text, got null"),
        ("data.path=???", "data.path has no value yet (???)"),
        ("lora.target_modules=q_proj", "lora.target_modules takes a list of names such as [a,b], got 'q_proj'"),
        (
            "memory.random_budget=[9,x]",
            "memory.random_budget takes a list of whole numbers such as [64,1024] or null, got [9, 'x']",
        ),
        ("model.dtype=fp16", "model.dtype takes one of float32, bfloat16, float64, got 'fp16'"),
        ("selection.variant=papre", "selection.variant takes one of paper, release, got 'papre'"),
        (
            "selection.redundancy=x",
            "selection.redundancy takes one of hidden, sketch, value, key or null, got 'x'",
        ),
        ("selection.neighbours=x", "one of sequence, modality or null"),
        ("selection.accumulation=x", "one of mean, sum, ema or null"),
        ("selection.attention_scores=x", "one of heads, concat or null"),
        ("selection.factor=x", "one of linear, sqrt or null"),
        ("data.on_bad_row=x", "data.on_bad_row takes one of error, skip, got 'x'"),
        ("memory.mean_budget=0", "memory.mean_budget must be at least 2 tokens, got 0"),
        ("memory.mean_budget=1", "memory.mean_budget must be at least 2 tokens, got 1"),
        ("memory.ratio=0", "memory.ratio must be above 0, got 0.0"),
        ("data.fps=0", "data.fps must be above 0, got 0.0"),
        ("data.fps=-1", "data.fps must be above 0, got -1.0"),
        (
            "data.fps=0.33",
            "data.chunk_seconds must hold a whole number of frames, got 10 s at data.fps 0.33 = 3.3",
        ),
        ("data.chunk_seconds=0.5", "data.chunk_seconds must hold a whole number of frames"),
        ("data.time_scale=fast", "data.time_scale must be auto or a number above 0, got 'fast'"),
        ("data.time_scale=0", "data.time_scale must be auto or a number above 0, got 0.0"),
        ("data.max_seconds=0", "data.max_seconds must be above 0, got 0.0"),
        ("train.learning_rate=-1", "train.learning_rate must be at least 0, got -1.0"),
        ("train.learning_rate=nan", "train.learning_rate must be finite, got nan"),
        ("train.adam_beta2=.inf", "train.adam_beta2 must be finite"),
        ("train.adam_beta1=1", "train.adam_beta1 must be at least 0 and below 1, got 1.0"),
        ("train.max_steps=0", "train.max_steps must be at least 1, got 0"),
        ("train.per_device_train_batch_size=0", "train.per_device_train_batch_size must be at least 1, got 0"),
        ("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps must be at least 1, got 0"),
        ("train.warmup_ratio=2", "train.warmup_ratio must be between 0 and 1, got 2.0"),
        ("lora.lora_dropout=1", "lora.lora_dropout must be at least 0 and below 1, got 1.0"),
        ("lora.r=-1", "lora.r must be at least 0, got -1"),
        ("lora.r=0", "lora.r=0 with selection.method=omnimem leaves nothing to train"),
        ("lora.target_modules=[]", "lora.target_modules must be a list of at least one module name, got []"),
        ("model.name_or_path= ", "model.name_or_path takes text, got null"),
        ("finish.media=clip.mp4", "finish.media without finish.question: set the question about the clip"),
        ("train.seed=1" + "0" * 26, "train.seed must be at most 4294967295, got 1000"),
        ("train.max_steps=1" + "0" * 26, "train.max_steps must be at most 2147483647, got 1000"),
        ("train.learning_rate=" + "9" * 400, "train.learning_rate takes a number, got 9999"),
        ("data.time_scale=" + "9" * 400, "data.time_scale takes text or a number, got 9999"),
        ("memory.random_budget=[9," + "9" * 400 + "]", "memory.random_budget"),
        ("train.learning_rate=" + "9" * 5000, "train.learning_rate takes a number, cannot read '9999"),
        ("train.learning_rate=" + "[" * 3000 + "]" * 3000, "train.learning_rate takes a number, cannot read '[[["),
        (
            "train.learning_rate=" + "{a: " * 500 + "1" + "}" * 500,
            "train.learning_rate takes a number, cannot read '{a: {a:",
        ),
        (
            "memory.random_budget=64",
            "memory.random_budget takes a list of whole numbers such as [64,1024] or null, got 64",
        ),
        ("data={fps: 1000, chunk_seconds: 1.0e+308}", "data.chunk_seconds must hold a whole number of frames"),
        ("data.fps=1e18", "data.fps must be at most 1024, got 1e+18"),
        ("data.max_seconds=1e-300", "data.max_seconds must be above 0.000001, got 1e-300"),
        ("train.threads=1" + "0" * 9, "train.threads must be at most 1024"),
        ("lora.r=1" + "0" * 9, "lora.r must be at most 65536"),
        ("output_dir=runs/" + "x" * 300, "output_dir must have path components of at most 255 bytes, got 'runs/xxx"),
        ("output_dir=" + "é" * 128, "output_dir must have path components of at most 255 bytes"),
        ("output_dir=a\udcff", r"argument 'output_dir=a\udcff' is not valid UTF-8 text"),
        ("train.learning_rate=\ud800", r"argument 'train.learning_rate=\ud800' is not valid UTF-8 text"),
        ("recipe=\udcff", r"argument 'recipe=\udcff' is not valid UTF-8 text"),
        ("recipe=" + "x" * 300 + ".yaml", "does not exist; "),
        ("recipe=" + "a/" * 3000, "does not exist; "),
        ("recipe=~nosuchuser/mine.yaml", "recipe file ~nosuchuser/mine.yaml does not exist; "),
    ],
)
def test_mistakes_in_arguments(recipe, argument, message):
    assert message in fails(recipe(), argument)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  learning_rate: [1\n", ":3: not valid YAML: "),
        ("train: {learning_rate: 1, learning_rate: 2}\n", ":1: not valid YAML: found duplicate key learning_rate"),
        ("train:\n\tlearning_rate: 3\n", ":2: not valid YAML"),
        ("a: \x00", ": not valid YAML: "),
        ("x: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML: could not determine a constructor"),
        ("- a\n", ": a recipe is a mapping of keys to values, this is a list"),
        ("3\n", ": a recipe is a mapping of keys to values"),
        ("train:\n  learning_rate: x\n", ": train.learning_rate takes a number, got 'x'"),
        ("train:\n", ": train is a group of keys such as train.max_steps, got null"),
        ("train: {steepness: 1}\n", ": unknown key train.steepness; train has max_steps,"),
        ("lora: {target_modules: {a: 1}}\n", ": lora.target_modules takes a list of names such as [a,b], got {'a': 1}"),
        ("1: 2\n", ": unknown key 1; "),
        ("train: " + "[" * 3000 + "]" * 3000, ": too deeply nested; "),
        ("train: " + "{a: " * 300 + "1" + "}" * 300, ": too deeply nested; "),
        ("train: {learning_rate: " + "9" * 5000 + "}", ": not valid YAML: Exceeds the limit"),
        ("train: {learning_rate: " + "9" * 400 + "}", ": train.learning_rate takes a number, got 9999"),
    ],
)
def test_mistakes_in_a_file_name_the_file(recipe, text, message):
    argument = recipe(text)
    assert argument.removeprefix("recipe=") + message in fails(argument)


def test_text_that_no_file_holds(recipe):
    message = fails(recipe('output_dir: "a\\0b"\n'))
    assert message == r"output_dir must be valid UTF-8 text without NUL characters, got 'a\x00b'"


MALFORMED = [
    *("9" * 26, "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 200, "1e308", "1e400", "1e-320", "nan", ".inf"),
    *("x" * 300, "a/" * 3000, "a\0b", "\ud800", "\udcff", "\u202e", "é\n", "???", "~", "~nosuch/x", "", "  ", "- a"),
    *("[", "[" * 600, "[" * 600 + "]" * 600, "{a: " * 300 + "1" + "}" * 300, "[null]", "[[1]]", "{}", "&a [*a]", "*a"),
    *("${x}", "${", "${oc.env:NO}", "${oc.decode:'[1'}", "!!binary aGk=", "!!python/object:os.x {}", "2020-01-01", "|"),
]


def test_anything_malformed_is_one_line_or_a_recipe(recipe):
    """Values drawn at random for keys drawn at random: nothing but an `OmniMemError` comes out."""
    chosen, keys, argument = random.Random(0), [*KEY_TYPES, "train", "zzz"], recipe()
    refused = 0
    for _ in range(150):
        key, value = chosen.choice(keys), chosen.choice(MALFORMED)
        try:
            load_recipe([argument, f"{key}={value}"])
        except OmniMemError as error:
            line, refused = str(error), refused + 1
            assert "\n" not in line and len(line) < 700 and line.encode(), (key, value)
    assert refused > 100


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00a: 1")
    assert "binary.yaml" in fails(f"recipe={path}")


def test_no_torch_is_imported():
    code = "import sys, omnimem.recipe; sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
