"""From a recipe to the objects of a run: base model, adapter, budgets, selection."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel

from data_prep.manifest import media_root
from omnimem.backbones import TINY, Backbone, backbone_class, detect_backbone, load_backbone
from omnimem.backbones.adapter import BASE_FOLDER, modules_to_save
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.budget.allocation import with_mean
from omnimem.errors import OmniMemError
from omnimem.media import MediaError, probe
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.store import DiskStore, HostStore, Store
from omnimem.recipe import Recipe
from omnimem.selection import SelectionMethod, build_selection, options_of
from omnimem.stream_settings import StreamSettings
from omnimem.tape import Truncation
from train.checkpoint import RECORDS
from train.objective import StreamObjective
from train.processes import ParallelStrategy
from train.teacher import TeacherAnswers


def build_base(recipe: Recipe, output_dir: Path) -> None:
    """Build the offline stand-in inside the run's folder when the recipe asks for ``tiny``."""
    base = output_dir / BASE_FOLDER
    if recipe.model.name_or_path == TINY and not base.is_dir():
        backbone_class(backbone_of(recipe)).build_tiny(base, seed=recipe.model.seed)


def backbone_of(recipe: Recipe) -> str:
    """Name of the backbone of a recipe's model.

    Raises
    ------
    OmniMemError
        The checkpoint cannot be reached, has no backbone here, or contradicts ``model.backbone``.
    """
    return detect_backbone(recipe.model.name_or_path, recipe.model.backbone, use_builtin_config=recipe.dry_run)


def check_recipe(recipe: Recipe) -> tuple[Backbone, BudgetProfile]:
    """Find every mistake that can be found before a weight is loaded or a file written.

    Returns
    -------
    tuple
        The model as shapes only (``meta`` device) and the budgets of the run.

    Raises
    ------
    OmniMemError
        The model is not there, the chunks do not fit it, the budgets or LoRA targets are not its own, the method or
        its switches are unknown, or the clip of the last question is missing.
    """
    method, settings = selection_of(recipe), settings_of(recipe)
    skeleton = load_backbone(
        recipe.model.name_or_path,
        backbone=recipe.model.backbone,
        dtype=recipe.model.dtype,
        device="meta",
        use_builtin_config=recipe.dry_run,
    )
    settings.check(skeleton)
    check_lora_targets(recipe, skeleton)
    for name in recipe.lora.modules_to_save:
        if name not in skeleton.projectors:
            raise OmniMemError(f"lora.modules_to_save: {name!r} is none of {', '.join(skeleton.projectors)}")
    for name in recipe.train.report_to:
        if not find_spec(name):
            raise OmniMemError(f"train.report_to: {name} is not installed: pip install {name}")
    if recipe.model.load_in_4bit and not find_spec("bitsandbytes"):
        raise OmniMemError("model.load_in_4bit=true needs bitsandbytes: pip install 'omnimem[bitsandbytes]'")
    if recipe.finish.media:
        try:
            probe(media_root(recipe.data.path, recipe.data.root) / recipe.finish.media)
        except MediaError as error:
            raise OmniMemError(f"finish.media: {error}") from error
    profile = profile_of(recipe, skeleton, method, settings)
    count = len(profile.layers)
    cut = truncation_of(recipe, count)
    if not cut.detach_below_layer < (count if cut.detach_from_layer is None else min(cut.detach_from_layer, count)):
        raise OmniMemError(
            f"train.detach_below_layer={recipe.train.detach_below_layer:g} and "
            f"train.detach_from_layer={cut.detach_from_layer} leave none of the {count} "
            "layers"
        )
    CompressedCache(profile, method, gradient_of(recipe, 0.0))  # refuses a selection that no gradient can reach
    for mean in (recipe.memory.start_budget, *(recipe.memory.random_budget or ())):
        if mean is not None:
            with_mean(profile, mean)  # refuses what cannot hold the floors
    return skeleton, profile


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


def add_lora(recipe: Recipe, backbone: Backbone) -> PeftModel:
    """Put fresh adapters on the language model; of the encoders only the projectors a recipe names are trained."""
    torch.manual_seed(recipe.train.seed)
    projectors = [backbone.projectors[name] for name in recipe.lora.modules_to_save]
    targets = backbone.lora_target_regex(recipe.lora.target_modules)
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=targets,
        # For mixtures of experts PEFT shortens the expression to bare names, which the encoders have too.
        exclude_modules=rf"(?!{targets}$).*",
        task_type="CAUSAL_LM",
        modules_to_save=projectors or None,
    )
    with quiet_transformers():
        model = PeftModel(backbone.model, config)
    for module in modules_to_save(model).values():
        _train_in_float32(module)
    return model


def _train_in_float32(module: torch.nn.Module) -> None:
    """In bfloat16 small steps would round away; outside nobody sees another dtype."""
    outside = next(module.parameters()).dtype
    if outside in (torch.float32, torch.float64):
        return
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(one.float() for one in inputs))
    module.register_forward_hook(lambda _, inputs, output: output.to(outside))


def check_lora_targets(recipe: Recipe, backbone: Backbone) -> None:
    """Refuse a target that names no projection of the language model."""
    modules = [name for name, _ in backbone.model.named_modules()]
    for target in recipe.lora.target_modules:
        pattern = re.compile(backbone.lora_target_regex([re.escape(target)]))
        if not any(pattern.fullmatch(name) for name in modules):
            raise OmniMemError(
                f"lora.target_modules: {target!r} is no projection of {backbone.name}'s language model; use some of "
                "q_proj, "
                "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            )


def selection_of(recipe: Recipe) -> SelectionMethod:
    """The selection method of a recipe; a switch that its method does not have must be left out.

    Raises
    ------
    OmniMemError
        Unknown method, or a switch given that the method does not have.
    """
    known = options_of(recipe.selection.method)
    given = {}
    for key, value in asdict(recipe.selection).items():
        # `variant` and `seed` always have a value; they only go to the methods that know them.
        if key in ("method", "gradient") or value is None or (key in ("variant", "seed") and key not in known):
            continue
        given[key] = value
    return build_selection(recipe.selection.method, **given)


def gradient_of(recipe: Recipe, progress: float) -> SelectionGradient | None:
    """How gradients reach the selection when so much (0 to 1) of the training is done; None where they do not."""
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


def store_of(recipe: Recipe, output_dir: Path, accelerator: Accelerator) -> Store:
    """Where records wait for the way back; host memory is the device's own where there is no other."""
    if recipe.train.offload == "disk":
        folder = output_dir / RECORDS / str(accelerator.process_index)
        folder.mkdir(parents=True, exist_ok=True)
        return DiskStore(folder)
    if recipe.train.offload == "none" or accelerator.device.type == "cpu":
        return Store()
    return HostStore(accelerator.device)


def truncation_of(recipe: Recipe, layers: int) -> Truncation:
    """Where gradients end, in a model of so many layers."""
    cut = recipe.train.detach_below_layer
    return Truncation(recipe.train.bptt_window, int(cut * layers if cut < 1 else cut), recipe.train.detach_from_layer)


def objective_of(
    recipe: Recipe,
    output_dir: Path,
    accelerator: Accelerator,
    backbone: Backbone,
    model: PeftModel,
    profile: BudgetProfile,
    processes: ParallelStrategy,
) -> StreamObjective:
    """What the recipe's steps minimise."""
    return StreamObjective(
        backbone,
        model,
        profile,
        selection_of(recipe),
        settings_of(recipe),
        recipe.distill,
        skip_damaged=recipe.data.on_bad_row == "skip",
        store=store_of(recipe, output_dir, accelerator),
        truncation=truncation_of(recipe, len(profile.layers)),
        processes=processes,
        encoders_learn=bool(recipe.lora.modules_to_save),
        decode_ahead=recipe.data.prefetch_chunks,
        answers=TeacherAnswers.of(recipe, output_dir) if recipe.distill.cache_dir else None,
    )


def settings_of(recipe: Recipe) -> StreamSettings:
    """How the recipe's media are read."""
    names = {field.name for field in fields(StreamSettings)}
    values = {key: value for key, value in asdict(recipe.data).items() if key in names}
    return StreamSettings(**values)


def profile_of(recipe: Recipe, backbone: Backbone, method: SelectionMethod, settings: StreamSettings) -> BudgetProfile:
    """The budgets of a run, with all that is needed to use its adapter the way it was trained.

    Raises
    ------
    OmniMemError
        The given profile is not readable or belongs to another model.
    """
    memory = recipe.memory
    if memory.profile is None:
        ratio = memory.ratio if backbone.supports_audio else math.inf
        profile = BudgetProfile.uniform(backbone.config, memory.mean_budget, ratio)
    else:
        profile = BudgetProfile.load(memory.profile)
        profile.check_model(backbone.config)
    return replace(
        profile,
        model=ModelFingerprint.of(backbone.config),
        model_id=recipe.model.name_or_path,
        selection={"method": recipe.selection.method, **method.recorded()},
        stream=settings.recorded(),
    )
