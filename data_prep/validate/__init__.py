"""`omnimem data validate`: every media file of a data set opened and decoded before a training run meets it.

    omnimem data validate train.jsonl
    omnimem data validate clips/ --report clips.json --workers 8

Files are looked at one by one in processes of their own (`file.py`, `tracks.py`), rows of a manifest against what
was found in their files (`rows.py`); what is finished is kept (`record.py`), so that a run over thousands of files
can be interrupted. `run.py` puts them together.
"""

from .findings import Finding
from .run import validate, validate_command

__all__ = ["Finding", "validate", "validate_command"]
