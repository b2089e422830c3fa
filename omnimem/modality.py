"""The three modalities of a token, as the small integers stored beside every token."""

TEXT, VISUAL, AUDIO = 0, 1, 2
"""Text is always retained; visual and audio tokens compete for their own budgets (arXiv 2606.07577)."""

EVICTABLE = {"visual": VISUAL, "audio": AUDIO}
"""The modalities that have a budget, by the name used in profiles and tables."""

KINDS = {"text": TEXT, **EVICTABLE}
"""All three by name."""
