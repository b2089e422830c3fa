"""Recipes: the dataclasses below are the only source of defaults, YAML and `key=value` say what differs.

    accelerate launch train.py recipe=quickstart train.max_steps=3 lora.target_modules=[q_proj,v_proj]

OmegaConf checks keys and types; after `load_recipe` there are plain dataclasses only. Every mistake is one
`OmniMemError` line that names the key and what it takes. Nothing here imports torch, so a typing mistake is
answered at once and not after a model has loaded.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from keyword import iskeyword
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from omnimem.errors import OmniMemError, is_storable

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass
class ModelConfig:
    """Which model is fine-tuned."""

    backbone: str | None = None  # null: detected from the checkpoint's configuration (`tiny`: qwen2_5_omni)
    name_or_path: str = "tiny"  # hub id, directory, or `tiny`: the offline stand-in of the backbone
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    load_in_4bit: bool = False  # NF4 weights in the decoder's projections (QLoRA)
    seed: int = 0  # weights of `tiny`


@dataclass
class DataConfig:
    """What is read, and how it is cut into chunks."""

    path: str = "quickstart"  # manifest, prepared folder, or `quickstart`: the clips that ship with the package
    root: str | None = None  # folder media paths are relative to; null: the manifest's folder
    fps: float = 1.0
    chunk_seconds: float = 10.0
    short_side: int | None = 360  # pixels
    audio: bool = True
    max_seconds: float | None = None
    max_pixels: int | None = None  # per frame, after the backbone's resize
    time_scale: str | float = "auto"
    position_layout: Literal["train", "release"] = "train"  # video-SALMONN 2+ 3B/7B/72B
    timestamps: int | None = 256  # most times written between pictures (Qwen3-VL family); null: one a temporal patch
    on_bad_row: Literal["error", "skip"] = "error"
    shuffle: bool = True
    prefetch_chunks: int = 2  # chunks of every clip that a thread decodes before they are needed


@dataclass
class MemoryConfig:
    """How many positions a layer keeps."""

    mean_budget: int = 8192  # visual and audio positions together, mean over layers
    ratio: float = 5.0  # visual positions for each audio position
    profile: str | None = None  # a BudgetProfile file; overrides the two above
    start_budget: int | None = None  # mean budget of the first step, falling to the one above; null: no curriculum
    curriculum_ratio: float = 0.5  # of the steps, after which it has fallen
    random_budget: list[int] | None = None  # [least, most]: another mean budget every step


@dataclass
class SelectionConfig:
    """Which positions stay. A null field is what `variant` says (see `omnimem.selection`)."""

    method: str = "omnimem"
    variant: Literal["paper", "release"] = "paper"
    lambda_: float | None = None
    redundancy: Literal["hidden", "sketch", "value", "key"] | None = None
    neighbours: Literal["sequence", "modality"] | None = None
    accumulation: Literal["mean", "sum", "ema"] | None = None
    ema_decay: float | None = None
    attention_scores: Literal["heads", "concat"] | None = None
    factor: Literal["linear", "sqrt"] | None = None
    sketch_dim: int | None = None
    query_stride: int | None = None
    seed: int = 0
    position_ids: Literal["original", "compact"] | None = None  # rotary ids of what stays; null: the method's own
    num_sink_tokens: int | None = None  # streaming_llm
    window_size: int | None = None  # snapkv
    kernel_size: int | None = None  # snapkv
    share: float | None = None  # infinipot_v
    recent: float | None = None  # infinipot_v
    gradient: Literal["none", "straight_through", "soft"] = "straight_through"  # into the selection scores (see `gate`)


@dataclass
class GateConfig:
    """The gradient through the selection (`selection.gradient`; see `omnimem.memory.margin`)."""

    temperature: float = 0.3
    temperature_end: float | None = None  # null: as at the start
    schedule: Literal["linear", "cosine", "exponential"] = "exponential"  # from the one to the other
    margin: int | None = None  # evicted positions a layer that are looked at; null: as many as a chunk brings
    gradient_scale: float = 16.0  # weight of the gradient through the selection; 1 is exact for soft
    threshold: Literal["boundary", "bisection"] = "boundary"
    through_attention: bool = False  # also through the attention mass (worth it with a large selection.lambda)


@dataclass
class DistillConfig:
    """The same model with everything in view as a teacher of the answers; its cache grows with the stream."""

    weight: float = 0.0  # of the divergence beside the cross-entropy; 0: no teacher
    temperature: float = 1.0
    teacher_adapter: bool = False  # whether the teacher has the adapter that is being trained
    cache_dir: str | None = None  # folder in which its answers are kept for later epochs and runs


@dataclass
class LoraConfig:
    """Adapters."""

    r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    modules_to_save: list[str] = field(default_factory=list)  # projectors trained in full: visual, audio


@dataclass
class TrainConfig:
    """Optimisation, logging and checkpoints."""

    max_steps: int | None = None  # null: as many as `epochs` needs
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1  # streams per device
    gradient_accumulation_steps: int = 1  # batches per optimiser step
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    learning_rate: float = 2e-5
    modules_to_save_learning_rate: float = 1e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    warmup_ratio: float = 0.03
    min_lr_rate: float = 0.0  # of lr, where the cosine ends
    max_grad_norm: float = 1.0
    offload: Literal["none", "host", "disk"] = "host"  # where evicted tokens are kept for the backward pass
    bptt_window: int | None = (
        None  # chunks that the gradient of each question reaches, whatever else is asked; null: all
    )
    detach_below_layer: float = (
        0  # first layer that learns from chunks no question follows; below 1: a share (the paper's: 0.5)
    )
    detach_from_layer: int | None = None  # layer from which on such chunks teach nothing; null: all do
    seed: int = 0
    logging_steps: int = 1  # steps
    report_to: list[str] = field(default_factory=list)  # beside TensorBoard: wandb, trackio
    project: str = "omnimem"  # of the trackers
    run_name: str | None = None  # in the trackers; null: the name of output_dir
    save_steps: int = 100  # steps
    save_total_limit: int = 2
    threads: int | None = None  # torch CPU threads; null: torch decides
    ddp_timeout: int = 10800  # seconds a process waits for the others, whose streams may be longer, before the run ends


@dataclass
class EvalConfig:
    """Held-out questions during training."""

    path: str | None = None  # manifest; null: none
    root: str | None = None  # its media, if not beside it
    eval_steps: int = 100  # steps
    early_stopping_patience: int | None = (
        None  # evaluations without a better one before the run ends; null: it does not
    )
    save_total_limit: int = 1  # best adapters that stay: best/, and best-step-… for the others


@dataclass
class FinishConfig:
    """What is done after the last step."""

    export: bool = False  # merge into <output_dir>/merged
    question: str | None = None  # asked about a clip when training has finished
    media: str | None = None  # that clip, in data.root; null: the first of the data


@dataclass
class Recipe:
    """One training run, complete."""

    recipe: str = ""  # the name or path it came from
    output_dir: str = ""  # empty: runs/<recipe name>
    resume_from_checkpoint: bool = True  # continue from the newest checkpoint in output_dir, if there is one
    dry_run: bool = False  # print the token, memory and step plan; load no weights
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    finish: FinishConfig = field(default_factory=FinishConfig)


def key_of(field_name: str) -> str:
    """Recipe key of a field: `lambda` for `lambda_`, which Python reserves."""
    return field_name.rstrip("_")


def value_of(recipe: Recipe, key: str) -> Any:
    """Value of a dotted recipe key."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, f"{name}_" if iskeyword(name) else name)
    return value


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dict of all keys and values."""
    return asdict(recipe, dict_factory=lambda pairs: {key_of(name): value for name, value in pairs})


def load_recipe(args: list[str]) -> Recipe:
    """Read `recipe=NAME-or-path` and apply the other `key=value` arguments on top; the last of a key wins.

    Values are read as YAML (`true`, `2e-5`, `[a, b]`, `null`), except for keys that hold text: those are
    taken as typed, so that a question may hold a colon.

    Raises
    ------
    OmniMemError
        No recipe or an unknown one, an unknown key, a value of the wrong type or out of range, broken YAML.
    """
    pairs = [_split(arg) for arg in args]
    names = [text for key, text in pairs if key == "recipe"]
    if not names or not names[-1]:
        raise OmniMemError(f"no recipe given; pass recipe=NAME, one of: {', '.join(list_recipes())}")
    path = _find(names[-1])

    config = OmegaConf.structured(Recipe(recipe=names[-1]))
    for key, value in _read_yaml(path).items():
        _assign(config, str(key), value, where=f"{path}: ")
    for key, text in pairs:
        if key != "recipe":
            _assign(config, key, _parse(key, text))
    try:
        recipe = cast(Recipe, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise OmniMemError(f"{error.full_key} has no value yet (???); pass {error.full_key}=...") from error
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise OmniMemError(f"{error.full_key}: {_first_line(error)}") from error

    recipe.output_dir = recipe.output_dir or f"runs/{path.stem}"
    validate(recipe)
    return recipe


def list_recipes() -> list[str]:
    """Names of the recipes in the repository, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """First sentence of the comment at the head of a recipe, which follows its launch line."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return re.split(r"(?<=[.;]) ", " ".join(line.strip("# ") for line in head).strip())[0].rstrip(".;")


def to_yaml(recipe: Recipe) -> str:
    """Return every field of `recipe` as YAML; `load_recipe(["recipe=<that file>"])` gives an equal Recipe.

    The file carries the name it came from in `recipe`, and that name wins over the file's own.
    """

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literal(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [literal(entry) for entry in value]
        if isinstance(value, str):  # a resolved value must not be resolved a second time
            return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
        return value

    return OmegaConf.to_yaml(OmegaConf.create(literal(to_dict(recipe))))


def validate(recipe: Recipe) -> None:
    """Check what types cannot say: ranges and what belongs together.

    Raises
    ------
    OmniMemError
        The first key that is out of range, with its value and what it takes.
    """
    for key, hint in LEAVES.items():
        value = value_of(recipe, key)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, float):
                _require(recipe, math.isfinite(entry), key, "finite")
            elif isinstance(entry, int):
                most = LARGEST_SEED if key.endswith("seed") else LARGEST
                _require(recipe, entry <= most, key, f"at most {most}")
            elif isinstance(entry, str):
                _require(recipe, is_storable(entry), key, "text that a file can hold (UTF-8, no NUL character)")
        _require(recipe, hint is not str or str(value).strip() != "", key, "something other than empty")
    longest = max(len(os.fsencode(name)) for name in (*Path(recipe.output_dir).parts, ""))
    _require(recipe, longest <= LONGEST_NAME, "output_dir", f"of names within {LONGEST_NAME} bytes")

    def check(key: str, holds: Callable[[float], bool], rule: str) -> None:
        value = value_of(recipe, key)
        _require(recipe, value is None or holds(value), key, rule)

    for least, keys in AT_LEAST.items():
        for key in keys:
            unit = " position" if key == "memory.mean_budget" else ""
            check(key, lambda value, least=least: value >= least, f"at least {least}{unit}")
    for most, keys in AT_MOST.items():
        for key in keys:
            check(key, lambda value, most=most: value <= most, f"at most {most}")
    for key in ABOVE_ZERO:
        check(key, lambda value: value > 0, "above 0")
    for key in FRACTIONS:
        check(key, lambda value: 0 <= value <= 1, "between 0 and 1")
    check("data.max_seconds", lambda value: value >= 1e-6, "above 0.000001")
    for key in ("lora.lora_dropout", "train.adam_beta1", "train.adam_beta2"):
        check(key, lambda value: 0 <= value < 1, "at least 0 and below 1")

    if recipe.model.dtype == "float16":
        raise OmniMemError(
            "model.dtype=float16: small gradients underflow without loss scaling, which training does not have; use "
            "bfloat16 or float32"
        )
    span = recipe.memory.random_budget
    ordered = span is None or (len(span) == 2 and 2 <= span[0] <= span[1])
    _require(recipe, ordered, "memory.random_budget", "two whole numbers, at least 2 and in order")
    if span is not None and recipe.memory.start_budget is not None:
        raise OmniMemError("memory.start_budget and memory.random_budget exclude each other; set one of them")
    targets = recipe.lora.target_modules
    _require(recipe, bool(targets) and all(targets), "lora.target_modules", "a list of at least one module name")
    scale = recipe.data.time_scale
    positive = scale > 0 if isinstance(scale, float) else scale == "auto"
    _require(recipe, positive, "data.time_scale", "auto or a number above 0")

    cut = recipe.train.detach_below_layer
    _require(
        recipe,
        cut < 1 or cut == int(cut),
        "train.detach_below_layer",
        "a whole number, or a share of the layers below 1",
    )
    frames = recipe.data.fps * recipe.data.chunk_seconds
    if math.isinf(frames) or round(frames) < 1 or not math.isclose(frames, round(frames), rel_tol=1e-9):
        raise OmniMemError(
            "data.chunk_seconds must hold a whole number of frames, got "
            f"{recipe.data.chunk_seconds:g} s at data.fps {recipe.data.fps:g} = {frames:g} frames"
        )
    unknown = [name for name in recipe.train.report_to if name not in TRACKERS]
    _require(recipe, not unknown, "train.report_to", f"some of {', '.join(TRACKERS)}")
    if recipe.distill.weight > 0 and not recipe.distill.teacher_adapter and recipe.lora.modules_to_save:
        raise OmniMemError(
            "the base model cannot teach while projectors change; leave lora.modules_to_save out, or "
            "distill.teacher_adapter=true"
        )
    if recipe.distill.cache_dir is not None and recipe.distill.teacher_adapter:
        raise OmniMemError(
            "distill.cache_dir keeps the base model's answers; with distill.teacher_adapter=true they change"
        )
    if recipe.finish.media is not None and recipe.finish.question is None:
        raise OmniMemError("finish.media without finish.question: set what is asked about the clip, or leave both out")


def without_effect(recipe: Recipe) -> list[str]:
    """One line for each group of keys that was set and that nothing reads."""
    default = Recipe()
    found = []
    for switch, off, keys in (
        ("selection.gradient=none", recipe.selection.gradient == "none", [k for k in LEAVES if k.startswith("gate.")]),
        (
            "distill.weight=0",
            recipe.distill.weight == 0,
            ["distill.temperature", "distill.teacher_adapter", "distill.cache_dir"],
        ),
        ("lora.modules_to_save=[]", not recipe.lora.modules_to_save, ["train.modules_to_save_learning_rate"]),
        (
            "eval.path=null",
            recipe.eval.path is None,
            ["eval.eval_steps", "eval.early_stopping_patience", "eval.save_total_limit", "eval.root"],
        ),
    ):
        given = [key for key in keys if value_of(recipe, key) != value_of(default, key)]
        if off and given:
            found.append(f"{', '.join(given)}: without effect, because {switch}")
    return found


LARGEST, LARGEST_SEED = 2**31 - 1, 2**32 - 1
"""Whole numbers that every library takes; seeds are multiplied before they reach a generator."""

LONGEST_NAME = 255
"""Bytes in the name of a file or folder, on every common file system."""

TRACKERS = ("wandb", "trackio")
"""Libraries with an `init`, a `log` and a `finish`."""

AT_LEAST: dict[int, tuple[str, ...]] = {
    0: (
        "data.prefetch_chunks",
        *("model.seed", "train.seed", "selection.seed", "selection.num_sink_tokens", "selection.lambda"),
        *(
            "distill.weight",
            "train.learning_rate",
            "train.weight_decay",
            "train.detach_below_layer",
            "train.modules_to_save_learning_rate",
        ),
    ),
    1: (
        *("data.short_side", "data.max_pixels", "data.timestamps", "memory.mean_budget"),
        *("selection.sketch_dim", "selection.query_stride"),
        *("lora.r", "lora.lora_alpha"),
        *(
            "train.max_steps",
            "train.per_device_train_batch_size",
            "train.gradient_accumulation_steps",
            "train.logging_steps",
            "train.save_steps",
        ),
        *("train.save_total_limit", "train.threads", "selection.window_size", "selection.kernel_size", "gate.margin"),
        *(
            "memory.start_budget",
            "eval.eval_steps",
            "eval.early_stopping_patience",
            "eval.save_total_limit",
            "train.bptt_window",
            "train.detach_from_layer",
        ),
        "train.ddp_timeout",
    ),
}
AT_MOST: dict[int, tuple[str, ...]] = {1024: ("data.fps", "train.threads"), 2**16: ("lora.r",)}
"""Beyond which no machine gives the memory or the threads."""

ABOVE_ZERO = (
    *("data.fps", "data.chunk_seconds", "data.max_seconds", "memory.ratio"),
    *(
        "train.num_train_epochs",
        "train.max_grad_norm",
        "gate.temperature",
        "gate.temperature_end",
        "gate.gradient_scale",
    ),
    "distill.temperature",
)
FRACTIONS = (
    "memory.curriculum_ratio",
    "selection.ema_decay",
    "selection.share",
    "selection.recent",
    "train.warmup_ratio",
    "train.min_lr_rate",
)


def _require(recipe: Recipe, holds: bool, key: str, rule: str) -> None:
    if not holds:
        raise OmniMemError(f"{key} must be {rule}, got {_show(value_of(recipe, key))}")


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the type of every field that holds a value."""
    hints = get_type_hints(cls)
    for entry in fields(cls):
        hint = hints[entry.name]
        if is_dataclass(hint):
            yield from _leaves(cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield prefix + key_of(entry.name), hint


LEAVES: dict[str, Any] = dict(_leaves(Recipe))
GROUPS = {key.split(".")[0] for key in LEAVES if "." in key}


def _split(arg: str) -> tuple[str, str]:
    if not is_storable(arg):
        raise OmniMemError(f"argument {arg!a} is not valid UTF-8 text")
    key, equals, text = arg.partition("=")
    if equals:
        return key.strip(), text.strip()
    hint = f"recipe={arg}" if arg in list_recipes() else "train.max_steps=100"
    raise OmniMemError(f"argument {arg!r} is not of the form key=value, such as {hint}")


def _find(name: str) -> Path:
    """Return the file of a recipe name, or of a path (it ends in .yaml or .yml, or has a folder in it)."""
    names = list_recipes()
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        # `os.path` takes a name that is too long for one that does not exist; `Path` raises.
        if os.path.isfile(path):
            return path
        problem = f"recipe file {_cut(name)} " + ("is not a file" if os.path.exists(path) else "does not exist")
    elif name in names:
        return RECIPES / f"{name}.yaml"
    else:
        problem = f"unknown recipe {_show(name)}"
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean recipe={near[0]}? " if near else ""
    raise OmniMemError(f"{problem}; {hint}recipes: {', '.join(names)}, or a path to a YAML file")


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OmniMemError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise OmniMemError(f"{path}: too deeply nested; a recipe has groups of keys and lists of values") from error
    except (yaml.YAMLError, ValueError) as error:  # also: not UTF-8, more digits than Python reads
        raise OmniMemError(f"{path}: not valid YAML: {_first_line(error)}") from error
    except OSError as error:
        # OmegaConf raises one of its own, without an errno, for a file that holds one plain value.
        reason = error.strerror or "a recipe is a mapping of keys to values"
        raise OmniMemError(f"{path}: {reason}") from error
    if not isinstance(loaded, DictConfig):
        raise OmniMemError(f"{path}: a recipe is a mapping of keys to values, this is a list")
    return cast(dict[Any, Any], OmegaConf.to_container(loaded, resolve=False))


def _parse(key: str, text: str) -> Any:
    """Read the value of a command line argument."""
    if text == "null" or not text:
        return None
    if _is_text(LEAVES.get(key)):
        return text
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        takes = _describe(LEAVES[key]) if key in LEAVES else "something else"
        raise OmniMemError(f"{key} takes {takes}, cannot read {_show(text)}") from error
    return cast(dict[str, Any], OmegaConf.to_container(value, resolve=False))["value"]


def _assign(config: DictConfig, key: str, value: Any, where: str = "") -> None:
    """Set one key, or every key of a group, in `config`."""
    if key in GROUPS:
        if not isinstance(value, dict):
            raise OmniMemError(f"{where}{key} is a group of keys such as {_example(key)}, got {_show(value)}")
        for name, entry in value.items():
            _assign(config, f"{key}.{name}", entry, where)
        return
    if key not in LEAVES:
        raise OmniMemError(f"{where}unknown key {key}{_suggest(key)}")
    hint = LEAVES[key]
    if isinstance(value, dict):
        raise OmniMemError(f"{where}{key} takes {_describe(hint)}, got {_show(value)}")
    try:
        if isinstance(value, int) and not isinstance(value, bool) and set(get_args(hint)) == {str, float}:
            value = float(value)  # OmegaConf does not widen a number inside a union
        OmegaConf.update(config, key.replace("selection.lambda", "selection.lambda_"), value)
    except (ValidationError, OverflowError) as error:
        raise OmniMemError(f"{where}{key} takes {_describe(hint)}, got {_show(value)}") from error
    except OmegaConfBaseException as error:
        raise OmniMemError(f"{where}{key}: {_first_line(error)}") from error


def _suggest(key: str) -> str:
    """Return a hint at the key that was meant: nearest in its group, or of that name in another group."""
    group, _, last = key.rpartition(".")
    names: dict[str, list[str]] = {}
    for known in LEAVES:
        names.setdefault(known.rpartition(".")[2], []).append(known)
    siblings = [known.rpartition(".")[2] for known in LEAVES if group and known.startswith(f"{group}.")]
    if last in names:
        near = names[last]
    elif siblings:
        near = [f"{group}.{name}" for name in difflib.get_close_matches(last, siblings, n=1)]
    else:
        near = difflib.get_close_matches(key, [*LEAVES, *GROUPS], n=1)
        near = near or [names[name][0] for name in difflib.get_close_matches(last, names, n=1)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if siblings:
        return f"; {group} has {', '.join(siblings)}"
    return f"; a recipe has {', '.join([name for name in names if name in LEAVES] + sorted(GROUPS))}"


def _is_text(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return True
    members = set(get_args(hint)) - {type(None)}
    return hint is str or (get_origin(hint) in (Union, UnionType) and all(map(_is_text, members)))


def _describe(hint: Any) -> str:
    """Name what a key of this type takes."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is list:
        return {
            str: "a list of names such as [a,b]",
            float: "a list of numbers such as [0.9,0.99]",
            int: "a list of whole numbers such as [64,1024]",
        }[get_args(hint)[0]]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(member) for member in get_args(hint))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words[hint]


def _example(group: str) -> str:
    return next(key for key in LEAVES if key.startswith(group + "."))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _cut(ascii(value) if isinstance(value, str) and not is_storable(value) else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _first_line(error: BaseException) -> str:
    return _cut((str(error).splitlines() or [type(error).__name__])[0])
