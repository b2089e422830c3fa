"""The model card of an export: what it is, what memory it was trained with, how to use it."""

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

A merged checkpoint of `{base}` fine-tuned with OmniMem while a compressed
streaming key-value cache was active. The stock class `{model_class}` loads it; to use it with the memory it was
trained for:

```python
from omnimem import StreamingSession

session = StreamingSession.from_pretrained("this-folder")
for event in session.watch("clip.mp4"):
    print(event.seconds, event.retained)
print(session.ask("What is heard?"))
```

| | |
|---|---|
| mean budget | {mean:g} positions a layer ({visual:g} visual + {audio:g} audio), {layers} layers |
| selection | `{selection}` |
| media | `{stream}` |
| weights | {dtype}{trained_on} |
| verified | {tensors} tensors equal base + adapter, rounded once; logits within {rounding:.1e} of base + adapter |
"""


def model_card(
    run: Path,
    base: str | Path,
    backbone: Backbone,
    profile: BudgetProfile,
    checked: Verification,
    quantized: bool = False,
) -> str:
    """Markdown with the metadata the hub reads.

    Parameters
    ----------
    run : Path
        Run that was exported.
    base : str or Path
        Model that its adapter was merged into.
    backbone : Backbone
        The merged model.
    profile : BudgetProfile
        Budgets saved with it.
    checked : Verification
        What was compared.
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
        trained_on=", the full-precision base; the adapter was trained on its NF4 form" if quantized else "",
        tensors=checked.tensors,
        rounding=checked.rounding,
    )
