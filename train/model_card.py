"""The model card of an export: base model, cache settings, usage, verification."""

from __future__ import annotations

import json
from pathlib import Path

from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile
from train.merge import Verification

TEMPLATE = """---
library_name: transformers
base_model: {base}
tags: [omnimem, audio-visual, streaming, kv-cache-compression]
---

# {name}

`{base}`, fine-tuned with OmniMem while a compressed, streaming KV cache was active, with the adapter merged. The
transformers class `{model_class}` loads it. To use it with the cache it was trained with:

```python
from omnimem import StreamingSession

session = StreamingSession.from_pretrained("this-folder")
for event in session.watch("clip.mp4"):
    print(event.seconds, event.retained)
print(session.ask("What is heard?"))
```

| | |
|---|---|
| mean budget | {mean:g} tokens per layer ({visual:g} visual + {audio:g} audio), {layers} layers |
| selection | `{selection}` |
| media | `{stream}` |
| weights | {dtype}{trained_on} |
| verified | {tensors} tensors equal base + adapter rounded once; logits within {difference:.1e} of the merged model's |
| logits, merged vs. unmerged (reported, not checked) | within {rounding:.1e} |
"""


def model_card(
    run: Path,
    base: str | Path,
    backbone: Backbone,
    profile: BudgetProfile,
    checked: Verification,
    quantized: bool = False,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Parameters
    ----------
    run : Path
        The exported run.
    base : str or Path
        The model that the adapter was merged into.
    backbone : Backbone
        The merged model.
    profile : BudgetProfile
        Budgets saved in the export.
    checked : Verification
        Result of the verification.
    quantized : bool
        Whether the adapter was trained on an NF4 base.
    """
    return TEMPLATE.format(
        name=run.resolve().name,
        base=profile.model_id or base,
        model_class=type(backbone.model).__name__,
        mean=profile.mean_budget,
        visual=sum(layer.visual for layer in profile.layers) / len(profile.layers),
        audio=sum(layer.audio for layer in profile.layers) / len(profile.layers),
        layers=len(profile.layers),
        selection=json.dumps(profile.selection),
        stream=json.dumps(profile.stream),
        dtype=str(backbone.model.dtype).removeprefix("torch."),
        trained_on=", the full-precision base; the adapter was trained on the base in NF4" if quantized else "",
        tensors=checked.tensors,
        difference=checked.difference,
        rounding=checked.rounding,
    )
