"""All clips in one folder, ordinary and broken ones side by side, as a user's data folder has them.

Copies of data_prep/quickstart and tests/data/media, made by the first process and used by those it starts. Worker
processes import this file, so it imports nothing heavy.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _folder() -> Path:
    if "OMNIMEM_TEST_CLIPS" not in os.environ:
        folder, owner = tempfile.mkdtemp(prefix="omnimem-clips-"), os.getpid()
        for source in ("data_prep/quickstart", "tests/data/media"):
            shutil.copytree(ROOT / source, folder, dirs_exist_ok=True)
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
        os.environ["OMNIMEM_TEST_CLIPS"] = folder
    return Path(os.environ["OMNIMEM_TEST_CLIPS"])


MEDIA = _folder()
WEBB = MEDIA / "speech_nasa_webb_narration_multistream.mp4"
RABBIT = MEDIA / "ambient_toy_rabbit_8s.mp4"
