"""The three kinds of position a memory holds, as the small integers stored beside every position."""

TEXT, VISUAL, AUDIO = 0, 1, 2
"""Text is always kept; visual and audio positions compete for their own budgets (method.md §1)."""

EVICTABLE = {"visual": VISUAL, "audio": AUDIO}
"""The modalities that have a budget, by the name used in profiles and tables."""

KINDS = {"text": TEXT, **EVICTABLE}
"""All three by name."""
