"""Fine-tuning with the compressed cache active: training loop, checkpoints, export.

Command: `accelerate launch train.py recipe=quickstart`; the guide is train/README.md.
"""
