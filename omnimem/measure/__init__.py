"""What a memory knows and what it costs: the commands `omnimem compare` and `omnimem bench`."""
