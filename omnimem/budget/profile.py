"""A budget profile: how many visual and audio tokens every layer retains, as a versioned JSON file.

Loading a profile needs neither the model nor torch::

    omnimem profile show profile.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

from omnimem.budget.statistics import METHOD, Calibration
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json

SCHEMA = "omnimem.budget_profile"
SCHEMA_VERSION = 1
PROFILE_FILE = "budget_profile.json"
"""File name of the profile in the folder of an adapter or a merged checkpoint."""

FIELDS = {
    "layers": (list, "a list"),
    "model_id": (str, "a string"),
    "selection": (dict, "an object"),
    "selection_heads": (str, "a string"),
    "stream": (dict, "an object"),
    "statistics": (dict, "an object"),
    "calibration_set": (str, "a string"),
    "source": (str, "a string"),
}
"""JSON type of each field of a profile, except ``model`` (an object or null)."""

DEFAULT_MEAN = 8192
"""Mean budget where nothing else is said."""

LARGEST_BUDGET = 2**40
"""Upper limit of a budget, far above the tokens of any stream."""

NESTING = 8
"""Deepest nesting of objects and lists in a profile; its own fields use five levels."""


@dataclass(frozen=True)
class LayerBudget:
    """Tokens one layer retains after every chunk, per modality; text tokens are retained in addition."""

    visual: int
    audio: int

    @property
    def total(self) -> int:
        """Visual and audio tokens together."""
        return self.visual + self.audio


@dataclass(frozen=True)
class ModelFingerprint:
    """The properties in which a profile and a language model must agree."""

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> ModelFingerprint:
        """Fingerprint of a transformers configuration (a text configuration or one that contains it)."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(text.model_type, text.num_hidden_layers, text.num_key_value_heads, head_dim)


@dataclass(frozen=True)
class BudgetProfile:
    """Per-layer visual and audio budgets and their origin.

    Parameters
    ----------
    layers : tuple of LayerBudget
        Budget of each layer, first layer first.
    model : ModelFingerprint, optional
        The model the budgets were made for; None for the published list format, which does not record it.
    model_id : str
        Hub id or name of that model.
    selection : dict
        Selection method (``method``) and its hyper-parameters, as used in training or calibration.
    stream : dict
        How media were read: frame rate, chunk length, resolution (`omnimem.stream_settings.StreamSettings`); and how
        keys and values were stored (``kv_dtype``).
    statistics : dict
        Calibration statistics (entropy, redundancy, counts); empty for given or uniform budgets.
    calibration_set : str
        Hash of the calibration clips; empty without calibration.
    source : str
        ``uniform``, ``published``, ``calibrated`` or ``given``.
    selection_heads : str
        SHA-256 of the trained heads of the selection method (``selection.safetensors``); empty without.

    Raises
    ------
    OmniMemError
        A budget below 1 or above `LARGEST_BUDGET`, or no layer.
    """

    layers: tuple[LayerBudget, ...]
    model: ModelFingerprint | None = None
    model_id: str = ""
    selection: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    calibration_set: str = ""
    source: str = "given"
    selection_heads: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise OmniMemError("budget profile: no layer; give one {visual, audio} pair per model layer")
        for index, layer in enumerate(self.layers):
            for name in ("visual", "audio"):
                value = getattr(layer, name)
                if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_BUDGET:
                    raise OmniMemError(
                        f"budget profile: layer {index} has {short(value)} {name} tokens; "
                        "every budget must be a whole number of at least 1 and at most 2^40"
                    )

    @property
    def mean_budget(self) -> float:
        """Mean number of retained visual and audio tokens per layer."""
        return sum(layer.total for layer in self.layers) / len(self.layers)

    @classmethod
    def uniform(
        cls, model_config: Any, mean: int = DEFAULT_MEAN, ratio: float = 5.0, model_id: str = ""
    ) -> BudgetProfile:
        """Give every layer the same budget, split between video and audio.

        Parameters
        ----------
        model_config : PreTrainedConfig
            Configuration of the model, or of its language model.
        mean : int
            Tokens per layer, visual and audio together; at least 2.
        ratio : float
            Visual tokens per audio token; infinite for models without audio support.

        Raises
        ------
        OmniMemError
            `mean` is below 2, or `ratio` is not positive.
        """
        if mean < 2:
            raise OmniMemError(f"mean budget must be at least 2 tokens (one per modality), got {mean}")
        if not ratio > 0:
            raise OmniMemError(f"visual to audio ratio must be above 0, got {ratio}")
        visual = min(max(round(mean / (1 + 1 / ratio)), 1), mean - 1)
        fingerprint = ModelFingerprint.of(model_config)
        budget = LayerBudget(visual, mean - visual)
        return cls((budget,) * fingerprint.layers, fingerprint, model_id, source="uniform")

    @classmethod
    def from_lists(cls, lists: list[list[int]]) -> BudgetProfile:
        """Read the published format: ``[[audio, visual], ...]``, one pair per layer."""
        pairs = []
        for index, pair in enumerate(lists):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise OmniMemError(f"budget profile: layer {index} is {short(pair)}, expected [audio, visual]")
            pairs.append(LayerBudget(visual=pair[1], audio=pair[0]))
        return cls(tuple(pairs), source="published")

    def to_lists(self) -> list[list[int]]:
        """Write the published format: ``[[audio, visual], ...]``, one pair per layer."""
        return [[layer.audio, layer.visual] for layer in self.layers]

    @classmethod
    def load(cls, path: str | Path) -> BudgetProfile:
        """Read a profile file, in JSON or in the published list format.

        Raises
        ------
        OmniMemError
            The file is missing, is not JSON, has another schema or version, or an invalid budget or statistics.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            # Refuse values that `save` could not write: NaN, lone surrogates.
            json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
        except FileNotFoundError:
            raise OmniMemError(f"{path}: no such budget profile; check the path") from None
        except (OSError, ValueError, RecursionError) as error:
            raise OmniMemError(f"{path}: not a readable JSON budget profile: {error}") from None
        try:
            return cls.from_lists(content) if isinstance(content, list) else cls._from_dict(content)
        except OmniMemError as error:
            raise OmniMemError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, content: Any) -> BudgetProfile:
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise OmniMemError(f"not a budget profile: expected a list of pairs or an object of schema {SCHEMA!r}")
        if content.get("version") != SCHEMA_VERSION:
            raise OmniMemError(
                f"budget profile version {short(content.get('version'))}; this release reads version {SCHEMA_VERSION}"
            )
        if _deeper(content, NESTING):
            raise OmniMemError(f"budget profile nests objects and lists more than {NESTING} deep")
        known = {field.name for field in fields(cls)}
        # `to_dict` writes these in addition, for human readers.
        if unknown := sorted(content.keys() - known - {"schema", "version", "omnimem_version", "mean_budget"}):
            raise OmniMemError(f"budget profile has an unknown field {unknown[0]!r}; remove it")
        for name, (kind, noun) in FIELDS.items():
            if not isinstance(content.get(name), kind):
                raise OmniMemError(f"budget profile: {name} must be {noun}, got {short(content.get(name))}")
        for name in ("selection", "stream"):
            for key, value in content[name].items():
                if isinstance(value, list | dict):
                    raise OmniMemError(f"budget profile: {name}: {key} must be a single value, got {short(value)}")
        try:
            given = {name: content[name] for name in known}
            given["layers"] = tuple(LayerBudget(**layer) for layer in content["layers"])
            given["model"] = ModelFingerprint(**content["model"]) if content["model"] else None
            profile = cls(**given)
        except (KeyError, TypeError) as error:
            raise OmniMemError(f"budget profile is incomplete or has an unknown field: {error}") from None
        if profile.statistics.get("method") == METHOD or "layers" in profile.statistics:
            Calibration.from_dict(profile.statistics, len(profile.layers))
        return profile

    def to_dict(self) -> dict[str, Any]:
        """The JSON object `save` writes."""
        from omnimem.version import __version__

        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "omnimem_version": __version__,
            "model_id": self.model_id,
            "model": asdict(self.model) if self.model else None,
            "source": self.source,
            "selection": self.selection,
            "selection_heads": self.selection_heads,
            "stream": self.stream,
            "mean_budget": self.mean_budget,
            "layers": [asdict(layer) for layer in self.layers],
            "statistics": self.statistics,
            "calibration_set": self.calibration_set,
        }

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, atomically."""
        atomic_write_json(path, self.to_dict())

    def save_lists(self, path: str | Path) -> None:
        """Write the published list format."""
        atomic_write_json(path, self.to_lists())

    def check_model(self, model_config: Any) -> None:
        """Refuse a model the profile was not made for.

        Raises
        ------
        OmniMemError
            The number of layers, the architecture or the key-value shape differs.
        """
        fingerprint = ModelFingerprint.of(model_config)
        if len(self.layers) != fingerprint.layers:
            raise OmniMemError(
                f"budget profile has {len(self.layers)} layers but the model ({fingerprint.architecture}) has "
                f"{fingerprint.layers}; use a profile made for this model"
            )
        if self.model is not None and self.model != fingerprint:
            raise OmniMemError(
                f"budget profile was made for {self.model} but the model is {fingerprint}; "
                "use a profile made for this model"
            )


def _deeper(content: Any, levels: int) -> bool:
    """Whether objects and lists are nested deeper than `levels`."""
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else None
    return inside is not None and (levels == 0 or any(_deeper(one, levels - 1) for one in inside))
