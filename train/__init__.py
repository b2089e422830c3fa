"""Fine-tuning while the bounded cache is active: configuration, the loop, checkpoints, export.

Command: `accelerate launch train.py recipe=quickstart`.
"""
