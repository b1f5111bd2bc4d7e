"""The cached row of a token: what a step stores, and how it comes out again.

`definition` has rotation, store and the 8-bit form in torch. `store` puts a step's rows into the cache and rotates its
queries, `gather` takes rows out as bf16 for prefill attention, `transfer` copies them as raw bytes for other workers.
"""
