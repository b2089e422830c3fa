"""Every recipe key with its type, its default and one comment: the only place that defines them.

Recipe files and ``key=value`` arguments say what differs. The comment beside a field (or above it, where the line is
full) is its text in the reference in recipes/README.md; `python -m omnimem.recipe.reference --write` updates it.
Names are those of Hugging Face and PEFT where they have one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, cast, get_type_hints

from omegaconf import OmegaConf

from omnimem.option_names import option_name, parameter_name


@dataclass
class ModelConfig:
    """The model to fine-tune."""

    backbone: str | None = None  # model family; null: detected from the checkpoint (`tiny`: qwen2_5_omni)
    name_or_path: str = "tiny"  # hub id, folder, or `tiny`: a small random model, built offline
    # of weights, activations and cache; float16 would need loss scaling, which training does not have
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    load_in_4bit: bool = False  # QLoRA: the decoder's projections in NF4
    seed: int = 0  # random weights of `tiny`


@dataclass
class DataConfig:
    """The training data, and how clips are read and split into chunks."""

    path: str = "quickstart"  # manifest, prepared folder, or `quickstart`: the clips that ship with the package
    root: str | None = None  # folder that media paths are relative to; null: the manifest's folder
    fps: float = 1.0  # frames per second
    chunk_seconds: float = 10.0  # length of a chunk; the cache is compressed after each one
    # frames are downscaled to this shorter side, never upscaled (pixels); null: as decoded
    short_side: int | None = 360
    audio: bool = True  # false: ignore audio tracks
    max_seconds: float | None = None  # read at most this much of a clip; null: all of it
    # maximum height x width of a frame after the backbone's resize; null: the backbone's own limit
    max_pixels: int | None = None
    time_scale: str | float = "auto"  # factor on temporal position ids; auto: lowered for clips past the trained range
    # temporal position ids of video-SALMONN 2+ 3B/7B/72B: as in its training code or as in its inference code
    position_layout: Literal["train", "release"] = "train"
    # models with timestamps (Qwen3-VL family, VideoLLaMA 3): maximum number of them; null: one per temporal patch
    timestamps: int | None = 256
    on_bad_row: Literal["error", "skip"] = "error"  # unreadable rows and clips end the run, or are skipped
    shuffle: bool = True  # a new order every epoch, from train.seed
    prefetch_chunks: int = 2  # chunks of each clip that a thread decodes in advance


@dataclass
class MemoryConfig:
    """Size of the compressed KV cache."""

    mean_budget: int | None = None  # visual and audio tokens per layer, mean over layers; null: as gib says, or 8192
    # GiB of the retained visual and audio tokens, all layers and everything stored with them, in place of mean_budget
    gib: float | None = None
    ratio: float = 5.0  # visual tokens per audio token
    profile: str | None = None  # budget profile file; replaces mean_budget and ratio; gib scales it
    start_budget: int | None = None  # curriculum: mean budget of the first step, lowered to that of the run; null: off
    curriculum_ratio: float = 0.5  # share of the steps over which the curriculum lowers the budget
    random_budget: list[int] | None = None  # [min, max]: draw a new mean budget every step; null: off
    # stored keys and values: in model.dtype, or encoded in 8 or 4 bits (omnimem/memory/README.md)
    kv_dtype: Literal["auto", "fp8", "int8", "int4"] = "auto"


@dataclass
class SelectionConfig:
    """Which tokens are retained. null: the default of the method or variant (omnimem/selection/README.md)."""

    method: str = "omnimem"  # `omnimem methods` lists them
    variant: Literal["paper", "release"] = "paper"  # omnimem: as in the paper, or as in the authors' code
    lambda_: float | None = None  # omnimem: exponent of the attention score
    redundancy: Literal["hidden", "sketch", "value", "key"] | None = None  # omnimem: states compared for similarity
    # omnimem: neighbours in the interleaved audio-visual sequence, or of the same modality
    neighbours: Literal["sequence", "modality"] | None = None
    # omnimem: how scores of retained tokens combine with those of a new chunk
    accumulation: Literal["mean", "sum", "ema"] | None = None
    ema_decay: float | None = None  # omnimem, accumulation=ema: weight of the earlier score
    # omnimem: softmax of each head, or one softmax over the concatenated heads
    attention_scores: Literal["heads", "concat"] | None = None
    factor: Literal["linear", "sqrt"] | None = None  # omnimem: 1 − similarity, or its square root
    sketch_dim: int | None = None  # learned, novelty, omnimem with redundancy=sketch: numbers per sketch
    sketch_bits: int | None = None  # learned, novelty: bits per number, 8 or 4
    # learned, novelty: similarity to retained tokens measured when a token arrives, or again at every compression
    novelty: Literal["arrival", "every_chunk"] | None = None
    # learned, dms, trim_kv, kvzap: width of the head's hidden layer; 0: a linear head
    head_hidden_size: int | None = None
    attention_term: bool | None = None  # learned: add the log attention score, with a learned weight
    age_term: bool | None = None  # learned: add the log age, with a learned weight
    query_stride: int | None = None  # attention scores from every n-th query of a chunk
    seed: int = 0  # random projections and random retention
    position_ids: Literal["original", "compact"] | None = None  # of retained tokens: as first assigned, or renumbered
    num_sink_tokens: int | None = None  # streaming_llm: first tokens, never evicted
    window_size: int | None = None  # snapkv: last queries that are observed
    kernel_size: int | None = None  # snapkv: width of the pooling, odd
    share: float | None = None  # infinipot_v: share of the budget selected by temporal redundancy
    recent: float | None = None  # infinipot_v: share of the frames that counts as recent
    gradient: Literal["none", "straight_through", "soft"] = "straight_through"  # into the selection scores (see gate)


@dataclass
class GateConfig:
    """Gates of `selection.gradient`: sigmoids of the selection scores (train/README.md)."""

    temperature: float = 0.3  # of the sigmoid, at the first step
    temperature_end: float | None = None  # at the last step; null: as at the first
    schedule: Literal["linear", "cosine", "exponential"] = "exponential"  # from temperature to temperature_end
    # evicted tokens per layer that get a gradient, best first; null: all (soft: as many as a chunk has)
    margin: int | None = None
    gradient_scale: float = 16.0  # factor on the gradient through the gates; 1 is exact for selection.gradient=soft
    # score at which a gate is 0.5: midpoint of the K-th and (K+1)-th score (K: the budget), or solved so that the gates
    # sum to the budget
    threshold: Literal["boundary", "bisection"] = "boundary"
    # backpropagate also into the attention score a, not only the redundancy s (useful with a large selection.lambda)
    through_attention: bool = False


@dataclass
class DistillConfig:
    """Distillation from the same model with a full cache."""

    weight: float = 0.0  # of the KL divergence, added to the cross-entropy; 0: no teacher
    temperature: float = 1.0  # of both softmaxes in the divergence
    teacher_adapter: bool = False  # true: the teacher uses the adapter under training; false: the base model
    cache_dir: str | None = None  # store the teacher's logits here for later epochs and runs


@dataclass
class LoraConfig:
    """The adapter, as in PEFT's LoraConfig."""

    r: int = 128  # rank; 0: no adapter, only the heads of selection.method=learned are trained
    lora_alpha: int = 256  # scaling is lora_alpha / r
    lora_dropout: float = 0.05  # on the input of the adapter
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])  # in the decoder
    modules_to_save: list[str] = field(default_factory=list)  # projectors to train in full: visual, audio


@dataclass
class TrainConfig:
    """Optimization, logging and checkpoints, as in transformers' TrainingArguments."""

    max_steps: int | None = None  # optimizer steps; null: from num_train_epochs
    num_train_epochs: float = 1.0  # passes over the data
    per_device_train_batch_size: int = 1  # streams that a device runs together
    gradient_accumulation_steps: int = 1  # batches per optimizer step
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"  # optimizer
    learning_rate: float = 2e-5  # peak, for the adapter
    modules_to_save_learning_rate: float = 1e-5  # peak, for lora.modules_to_save
    selection_learning_rate: float = 1e-2  # peak, for the heads of selection.method=learned; they have no weight decay
    weight_decay: float = 0.0  # decoupled for AdamW
    adam_beta1: float = 0.9  # AdamW
    adam_beta2: float = 0.999  # AdamW
    warmup_ratio: float = 0.03  # share of the steps with linear warmup; a cosine follows
    min_lr_rate: float = 0.0  # final learning rate as a share of the peak
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # where evicted tokens are kept for the backward pass; none: on the device. On the CPU host is the same as none
    offload: Literal["none", "host", "disk"] = "host"
    bptt_window: int | None = None  # truncated BPTT: chunks that the gradient of a question reaches; null: all
    # chunks not directly followed by a question give gradients only to layers detach_below_layer <= l <
    # detach_from_layer; a value below 1 is a share of the layers
    detach_below_layer: float = 0
    detach_from_layer: int | None = None  # upper limit of that range; null: none
    seed: int = 0  # data order, adapter initialization, dropout
    logging_steps: int = 1  # steps between two lines of metrics.jsonl
    report_to: list[str] = field(default_factory=list)  # trackers in addition to TensorBoard: wandb, trackio
    project: str = "omnimem"  # project name in the trackers
    run_name: str | None = None  # run name in the trackers; null: the name of output_dir
    save_steps: int = 100  # steps between two checkpoints
    save_total_limit: int = 2  # newest checkpoints that are kept
    threads: int | None = None  # CPU threads of torch; null: torch decides
    ddp_timeout: int = 10800  # seconds that a process waits for the others, whose streams may be longer


@dataclass
class EvalConfig:
    """Evaluation on held-out questions during training."""

    path: str | None = None  # manifest of held-out questions; null: no evaluation
    root: str | None = None  # folder of its media; null: the manifest's folder
    eval_steps: int = 100  # steps between two evaluations
    early_stopping_patience: int | None = None  # end after this many evaluations without a new best; null: never
    save_total_limit: int = 1  # best adapters that are kept: `best/`, the others in `best-step-…`


@dataclass
class FinishConfig:
    """What to do after the last step."""

    export: bool = False  # merge the adapter into a checkpoint in `<output_dir>/merged`
    question: str | None = None  # ask the trained model this question
    media: str | None = None  # clip that the question is about, relative to data.root; null: the first clip of the data


@dataclass
class Recipe:
    """One training run."""

    recipe: str = ""  # name of a recipe in recipes/, or path of a YAML file
    output_dir: str = ""  # folder of the run; empty: `runs/<recipe name>`
    # continue from the newest checkpoint in output_dir; false: an error if it already holds a run
    resume_from_checkpoint: bool = True
    dry_run: bool = False  # print streams, steps and memory of the run; load no weights
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


def field_of(key: str) -> str:
    """Dotted field names of a dotted recipe key; the inverse of `key_of`."""
    return ".".join(parameter_name(name) for name in key.split("."))


def value_of(recipe: Recipe, key: str) -> Any:
    """Value of a dotted recipe key."""
    value: Any = recipe
    for name in field_of(key).split("."):
        value = getattr(value, name)
    return value


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dict of all keys and values."""
    return asdict(recipe, dict_factory=lambda pairs: {option_name(name): value for name, value in pairs})


def to_yaml(recipe: Recipe) -> str:
    """Return every key of `recipe` as YAML; ``load_recipe(["recipe=<that file>"])`` gives an equal Recipe.

    The key `recipe` inside the file holds the name that was loaded; that name wins over the path of the file.
    """

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [escape(entry) for entry in value]
        if isinstance(value, str):  # OmegaConf must not resolve ${...} a second time
            return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
        return value

    return OmegaConf.to_yaml(OmegaConf.create(escape(to_dict(recipe))))


def _key_types(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the type of every field that holds a value."""
    hints = get_type_hints(config)
    for entry in fields(config):
        hint = hints[entry.name]
        if is_dataclass(hint):
            yield from _key_types(cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield prefix + option_name(entry.name), hint


KEY_TYPES: dict[str, Any] = dict(_key_types(Recipe))
"""Type of every dotted key, in the order of the schema."""

GROUPS = {key.split(".")[0] for key in KEY_TYPES if "." in key}
"""Keys that hold other keys, such as `train`."""
