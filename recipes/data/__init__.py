"""Datasets: each is a `Task` (see `task`), made for one model's tokenizer and config."""
