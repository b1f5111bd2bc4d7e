"""Tokens from logits on the device.

`sample` launches the kernels in their order and has the first of them; `select` bins a row's distribution, `finish`
makes the draw exact; `parameters` says how a request's settings lie on the device. The definition is the sampler on the
host, which is not in this library: `tests/kernels/test_sampler.py` compares the two.
"""
