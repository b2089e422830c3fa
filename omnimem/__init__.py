"""OmniMem: fine-tune and run audio-visual language models with a memory of fixed size.

    from omnimem import StreamingSession

    session = StreamingSession.from_pretrained("runs/quickstart/merged")
    for event in session.watch("clip.mp4"):
        print(event)
    print(session.ask("What does the narrator say?"))

The public names are imported when they are first used: `import omnimem` costs nothing, so that the command
line answers `--help` at once.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimem.backbones import load_backbone
    from omnimem.budget import BudgetProfile
    from omnimem.errors import OmniMemError
    from omnimem.memory import CompressedCache
    from omnimem.selection import SELECTION_METHODS
    from omnimem.stream import StreamingSession

# peft imports it to see whether it is there, and on a CPU it complains of a faster kernel that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

__all__ = [
    "SELECTION_METHODS",
    "BudgetProfile",
    "CompressedCache",
    "OmniMemError",
    "StreamingSession",
    "__version__",
    "load_backbone",
]

_HOMES = {
    "BudgetProfile": "omnimem.budget",
    "CompressedCache": "omnimem.memory",
    "OmniMemError": "omnimem.errors",
    "SELECTION_METHODS": "omnimem.selection",
    "StreamingSession": "omnimem.stream",
    "load_backbone": "omnimem.backbones",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # asked for once: afterwards the module finds it by itself
    return value


def __dir__() -> list[str]:
    """List the public names for completion, imported or not."""
    return sorted({*globals(), *__all__})
