"""Build the objects of a run from its recipe: base model, adapter, budgets, selection, objective."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel

from data_prep.manifest import media_root
from omnimem.backbones import TINY, Backbone, backbone_class, detect_backbone, load_backbone
from omnimem.backbones.adapter import BASE_FOLDER, modules_to_save
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.bptt import Truncation
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.budget.allocation import with_mean
from omnimem.budget.profile import DEFAULT_MEAN
from omnimem.errors import OmniMemError
from omnimem.media import MediaError, probe
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.offload_store import DiskStore, HostStore, Store
from omnimem.memory.token_bytes import within
from omnimem.recipe import Recipe
from omnimem.selection import SelectionMethod, build_selection, options_of
from omnimem.selection.heads_file import ATTRIBUTE
from omnimem.selection.learned import Learned
from omnimem.stream_settings import StreamSettings
from train.checkpoint import EVICTED_FOLDER
from train.objective import StreamObjective
from train.parallel import ParallelStrategy
from train.teacher_cache import TeacherCache


def build_tiny_base(recipe: Recipe, output_dir: Path) -> None:
    """Build the small random model in the run's folder if the recipe names ``tiny``."""
    base = output_dir / BASE_FOLDER
    if recipe.model.name_or_path == TINY and not base.is_dir():
        backbone_class(backbone_name(recipe)).build_tiny(base, seed=recipe.model.seed)


def backbone_name(recipe: Recipe) -> str:
    """Name of the backbone that a recipe's model needs.

    Raises
    ------
    OmniMemError
        The checkpoint cannot be read, is of an unknown family, or contradicts ``model.backbone``.
    """
    return detect_backbone(recipe.model.name_or_path, recipe.model.backbone, use_builtin_config=recipe.dry_run)


def check_recipe(recipe: Recipe) -> tuple[Backbone, BudgetProfile]:
    """Check everything that can be checked before weights are loaded or files written.

    Returns
    -------
    tuple
        The model with shapes only (``meta`` device) and the budgets of the run.

    Raises
    ------
    OmniMemError
        The model is missing; chunks, budgets or LoRA targets do not fit it; the selection method or its options are
        unknown; an optional package is not installed; the clip of ``finish.media`` is missing.
    """
    method, settings = selection_method(recipe), stream_settings(recipe)
    skeleton = load_backbone(
        recipe.model.name_or_path,
        backbone=recipe.model.backbone,
        dtype=recipe.model.dtype,
        device="meta",
        use_builtin_config=recipe.dry_run,
    )
    settings.check(skeleton)
    check_lora_targets(recipe, skeleton)
    _check_packages(recipe)
    _check_finish_clip(recipe)
    profile = budget_profile(recipe, skeleton, method, settings)
    _check_changing_budget(recipe, profile)
    _check_truncation(recipe, len(profile.layers))
    # Raises if the method has no differentiable score for `selection.gradient`, or needs what `kv_dtype` cannot give.
    CompressedCache(profile, method, selection_gradient(recipe, 0.0), recipe.memory.kv_dtype)
    for mean in (recipe.memory.start_budget, *(recipe.memory.random_budget or ())):
        if mean is not None:
            with_mean(profile, mean)  # raises if the mean is too small for the floors
    return skeleton, profile


def check_lora_targets(recipe: Recipe, backbone: Backbone) -> None:
    """Refuse a LoRA target that matches no linear layer of the decoder, and an unknown projector."""
    modules = [name for name, _ in backbone.model.named_modules()]
    for target in recipe.lora.target_modules:
        pattern = re.compile(backbone.lora_target_regex([re.escape(target)]))
        if not any(pattern.fullmatch(name) for name in modules):
            raise OmniMemError(
                f"lora.target_modules: {target!r} is not a linear layer of {backbone.name}'s language model; use some "
                "of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            )
    for name in recipe.lora.modules_to_save:
        if name not in backbone.projectors:
            raise OmniMemError(f"lora.modules_to_save: {name!r} must be one of {', '.join(backbone.projectors)}")


def _check_packages(recipe: Recipe) -> None:
    for name in recipe.train.report_to:
        if not find_spec(name):
            raise OmniMemError(f"train.report_to: {name} is not installed: pip install {name}")
    if recipe.model.load_in_4bit and not find_spec("bitsandbytes"):
        raise OmniMemError("model.load_in_4bit=true needs bitsandbytes: pip install 'omnimem[bitsandbytes]'")


def _check_finish_clip(recipe: Recipe) -> None:
    if recipe.finish.media:
        try:
            probe(media_root(recipe.data.path, recipe.data.root) / recipe.finish.media)
        except MediaError as error:
            raise OmniMemError(f"finish.media: {error}") from error


def _check_changing_budget(recipe: Recipe, profile: BudgetProfile) -> None:
    """Budgets of single steps are tokens: `memory.gib` must not contradict them."""
    memory = recipe.memory
    if memory.gib is None:
        return
    mean = profile.mean_budget
    if memory.start_budget is not None and memory.start_budget < mean:
        raise OmniMemError(
            f"memory.start_budget={memory.start_budget} is below the {mean:g} tokens per layer of memory.gib="
            f"{memory.gib:g}, to which it is lowered: raise the first or lower the second"
        )
    if memory.random_budget is not None and not memory.random_budget[0] <= mean <= memory.random_budget[1]:
        raise OmniMemError(
            f"memory.random_budget={memory.random_budget} excludes the {mean:g} tokens per layer of memory.gib="
            f"{memory.gib:g}: widen the range, or leave one of the two out"
        )


def _check_truncation(recipe: Recipe, layers: int) -> None:
    truncation = bptt_truncation(recipe, layers)
    end = layers if truncation.detach_from_layer is None else min(truncation.detach_from_layer, layers)
    if truncation.detach_below_layer >= end:
        raise OmniMemError(
            f"train.detach_below_layer={recipe.train.detach_below_layer:g} and "
            f"train.detach_from_layer={truncation.detach_from_layer} leave none of the {layers} layers; lower the "
            "first or raise the second"
        )


def load_base(recipe: Recipe, output_dir: Path, device: torch.device) -> Backbone:
    """Load the base model, frozen."""
    tiny = recipe.model.name_or_path == TINY
    path = (output_dir / BASE_FOLDER).resolve() if tiny else recipe.model.name_or_path
    backbone = load_backbone(
        path,
        backbone=recipe.model.backbone,
        dtype=recipe.model.dtype,
        device=device,
        load_in_4bit=recipe.model.load_in_4bit,
    )
    backbone.model.requires_grad_(False)
    return backbone


def add_lora(recipe: Recipe, backbone: Backbone) -> Any:
    """Add a new adapter to the decoder; outside the decoder only `lora.modules_to_save` are trained.

    Returns
    -------
    PeftModel or PreTrainedModel
        The model with its adapter; the model itself with ``lora.r=0``.
    """
    if recipe.lora.r == 0:
        return backbone.model
    torch.manual_seed(recipe.train.seed)
    projectors = [backbone.projectors[name] for name in recipe.lora.modules_to_save]
    targets = backbone.lora_target_regex(recipe.lora.target_modules)
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=targets,
        # For mixtures of experts PEFT reduces the pattern to bare names, which would also match in the encoders.
        exclude_modules=rf"(?!{targets}$).*",
        task_type="CAUSAL_LM",
        modules_to_save=projectors or None,
    )
    with quiet_transformers():
        model = PeftModel(backbone.model, config)
    for module in modules_to_save(model).values():
        _train_in_float32(module)
    return model


def add_heads(method: SelectionMethod, backbone: Backbone) -> None:
    """Add untrained heads to the layers of the decoder, if the method has heads.

    They are modules of the layers, so that they are sharded, saved and restored with them.
    """
    if not isinstance(method, Learned):
        return
    model = backbone.language_model
    dtype = torch.promote_types(backbone.model.dtype, torch.float32)
    heads = method.new_heads(len(model.layers), model.config.hidden_size, dtype)
    for layer, head in zip(model.layers, heads, strict=True):
        setattr(layer, ATTRIBUTE, head.to(next(layer.parameters()).device))


def _train_in_float32(module: torch.nn.Module) -> None:
    """Train a module in float32, because small updates round to zero in bfloat16; its outputs keep their dtype."""
    dtype = next(module.parameters()).dtype
    if dtype in (torch.float32, torch.float64):
        return
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))
    module.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def selection_method(recipe: Recipe) -> SelectionMethod:
    """The selection method of a recipe, with the options that the recipe sets.

    Raises
    ------
    OmniMemError
        Unknown method, or an option that the method does not have.
    """
    known = options_of(recipe.selection.method)
    given = {}
    for key, value in asdict(recipe.selection).items():
        # `variant` and `seed` always have a value; only methods with these options receive them.
        if key in ("method", "gradient") or value is None or (key in ("variant", "seed") and key not in known):
            continue
        given[key] = value
    return build_selection(recipe.selection.method, **given)


def selection_gradient(recipe: Recipe, progress: float) -> SelectionGradient | None:
    """Gradient into the selection scores at a progress from 0 to 1; None with ``selection.gradient=none``."""
    gate = recipe.gate
    if recipe.selection.gradient == "none":
        return None
    start, end = gate.temperature, gate.temperature if gate.temperature_end is None else gate.temperature_end
    temperature = {
        "linear": start + (end - start) * progress,
        "cosine": end + (start - end) * (1 + math.cos(math.pi * progress)) / 2,
        "exponential": start * (end / start) ** progress,
    }[gate.schedule]
    return SelectionGradient(
        recipe.selection.gradient, temperature, gate.margin, gate.gradient_scale, gate.threshold, gate.through_attention
    )


def offload_store(recipe: Recipe, output_dir: Path, accelerator: Accelerator) -> Store:
    """Store of evicted tokens for the backward pass; on the CPU, device and host memory are the same."""
    if recipe.train.offload == "disk":
        folder = output_dir / EVICTED_FOLDER / str(accelerator.process_index)
        folder.mkdir(parents=True, exist_ok=True)
        return DiskStore(folder)
    if recipe.train.offload == "none" or accelerator.device.type == "cpu":
        return Store()
    return HostStore(accelerator.device)


def bptt_truncation(recipe: Recipe, layers: int) -> Truncation:
    """Truncated backpropagation in a model with `layers` layers."""
    below = recipe.train.detach_below_layer
    first = int(below * layers if below < 1 else below)
    return Truncation(recipe.train.bptt_window, first, recipe.train.detach_from_layer)


def build_objective(
    recipe: Recipe,
    output_dir: Path,
    accelerator: Accelerator,
    backbone: Backbone,
    model: Any,
    method: SelectionMethod,
    profile: BudgetProfile,
    strategy: ParallelStrategy,
) -> StreamObjective:
    """The training objective of a recipe for a model and a selection method that hold their trained modules."""
    return StreamObjective(
        backbone,
        model,
        profile,
        method,
        stream_settings(recipe),
        recipe.distill,
        skip_damaged=recipe.data.on_bad_row == "skip",
        store=offload_store(recipe, output_dir, accelerator),
        truncation=bptt_truncation(recipe, len(profile.layers)),
        strategy=strategy,
        train_encoders=bool(recipe.lora.modules_to_save),
        prefetch_chunks=recipe.data.prefetch_chunks,
        teacher_cache=TeacherCache.of(recipe, output_dir) if recipe.distill.cache_dir else None,
        kv_dtype=recipe.memory.kv_dtype,
    )


def stream_settings(recipe: Recipe) -> StreamSettings:
    """How a recipe reads media."""
    names = {field.name for field in fields(StreamSettings)}
    values = {key: value for key, value in asdict(recipe.data).items() if key in names}
    return StreamSettings(**values)


def budget_profile(
    recipe: Recipe, backbone: Backbone, method: SelectionMethod, settings: StreamSettings
) -> BudgetProfile:
    """The budgets of a run, with everything needed to use its adapter as it was trained.

    Raises
    ------
    OmniMemError
        `memory.profile` cannot be read or belongs to another model; `memory.gib` is too small.
    """
    memory = recipe.memory
    if memory.profile is None:
        ratio = memory.ratio if backbone.supports_audio else math.inf
        profile = BudgetProfile.uniform(backbone.config, memory.mean_budget or DEFAULT_MEAN, ratio)
    else:
        profile = BudgetProfile.load(memory.profile)
        profile.check_model(backbone.config)
    if memory.gib is not None:
        try:
            profile = within(profile, memory.gib, backbone, method, memory.kv_dtype)
        except OmniMemError as error:
            raise OmniMemError(f"memory.gib: {error}") from None
    return replace(
        profile,
        model=ModelFingerprint.of(backbone.config),
        model_id=recipe.model.name_or_path,
        selection={"method": recipe.selection.method, **method.recorded()},
        stream={**settings.recorded(), "kv_dtype": memory.kv_dtype},
    )
