"""`omnimem data validate`: decode every media file and check every row of a data set before training on it.

    omnimem data validate train.jsonl
    omnimem data validate clips/ --report clips.json --workers 8

Each file is checked in a worker process (`file.py`, `tracks.py`), the rows of a manifest against the results of their
files (`rows.py`). Results are saved one by one (`journal.py`), so that a run over thousands of files can be
interrupted. `targets.py` finds the files, `report.py` builds the report, `print_report.py` prints it.
"""

from .findings import Finding
from .run import validate, validate_command

__all__ = ["Finding", "validate", "validate_command"]
