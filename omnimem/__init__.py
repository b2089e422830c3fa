"""OmniMem: fine-tune and run audio-visual language models with a compressed KV cache of fixed size.

    from omnimem import StreamingSession

    session = StreamingSession.from_pretrained("runs/quickstart/merged")
    for event in session.watch("clip.mp4"):
        print(event)
    print(session.ask("What does the narrator say?"))

The public names are imported when they are first used, so that `import omnimem` and `omnimem --help` are fast.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from omnimem.version import __version__

if TYPE_CHECKING:
    from omnimem.backbones import load_backbone
    from omnimem.budget import BudgetProfile
    from omnimem.errors import OmniMemError
    from omnimem.memory import CompressedCache
    from omnimem.selection import SELECTION_METHODS
    from omnimem.stream import StreamingSession

# peft imports bitsandbytes to see whether it is installed; on a CPU that logs a warning about a missing kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = [
    "SELECTION_METHODS",
    "BudgetProfile",
    "CompressedCache",
    "OmniMemError",
    "StreamingSession",
    "__version__",
    "load_backbone",
]

_MODULES = {
    "BudgetProfile": "omnimem.budget",
    "CompressedCache": "omnimem.memory",
    "OmniMemError": "omnimem.errors",
    "SELECTION_METHODS": "omnimem.selection",
    "StreamingSession": "omnimem.stream",
    "load_backbone": "omnimem.backbones",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # later lookups find it without this function
    return value


def __dir__() -> list[str]:
    """List the public names for completion, whether imported or not."""
    return sorted({*globals(), *__all__})
