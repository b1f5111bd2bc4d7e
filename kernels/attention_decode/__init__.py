"""Absorbed attention of a decode step over the paged cache of latents.

`definition` has it in torch. `schedule` is the plan: splits at fixed positions, and the list of work, made on the
device. `attend` computes the splits, reading rows by `cached_rows`; `combine` folds their partial results in order.
"""
