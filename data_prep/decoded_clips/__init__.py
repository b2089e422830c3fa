"""Decoded clips, one Parquet shard each, so that training does not decode the original files in every run.

    omnimem data prepare train.jsonl --to prepared --workers 16      # writes a prepared folder
    python train.py recipe=quickstart data.path=prepared             # trains on it

    prepared/prepared.json     settings the clips were decoded with
    prepared/rows.jsonl        the rows of the manifest, each with its clip's metadata and the name of its shard
    prepared/clips/*.parquet   one shard per clip; a row group holds some seconds of encoded frames and audio samples

A shard depends neither on a model nor on the chunk length: training may use any `chunk_seconds`, and every frame rate
that divides the stored one. The original files are no longer needed.

- `prepare.py`: decode the clips of a manifest into a prepared folder
- `executors.py`: run that on local processes or on a Ray cluster
- `shard_writer.py`, `shard_reader.py`: one clip to one shard, and a shard back to chunks
- `folder.py`: read the rows and settings of a prepared folder
- `format.py`: settings, clip metadata and the names used in the files
- `command.py`: the command `omnimem data prepare`
"""
