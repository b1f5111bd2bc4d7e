"""Products: linear layers, products per head, router logits.

`definition` has them in torch, `bf16` the kernels in bf16, `fp8` those in block-FP8 with the quantisation of rows.
"""
