"""Operations of the token path: their definitions in plain torch and the Triton kernels that compute them.

A library of its own: it imports torch and triton, and nothing of this project.

A room for each operation holds its `definition`, what is computed, in torch; the kernels with the functions that launch
them; and, where there is one, the plan that says who computes what:

    products            linear layers, products per head and router logits, in bf16 and in block-FP8
    elementwise         embedding, RMS norm, SwiGLU
    latents             the cached row: rotation, store, 8-bit form, gathering, blocks for a transfer
    attention_decode    absorbed attention over the paged cache, split at fixed positions
    attention_prefill   expanded attention, segment by segment
    experts             the choice of experts, grouping by expert, and their products
    sampler             tokens from logits; its definition is the sampler on the host, outside this library

`table` has the committed launch configurations (`tuned/*.json`, a file for each room), `check` what a launch refuses,
`lang` what the kernels share, `shapes` the sizes of products in torch.

Definitions are written so that rows never see each other. Every product has one fixed shape per role: `group` rows at a
time, or a batch of equal small products. A library picks its algorithm, and with it the order of summation, from the
shape: in MKL [N, 1000] @ [1000, 700] gives other bits from N = 256 on, although N is a multiple of 16. Elementwise work
uses only operations whose bits do not depend on where in a tensor an element lies (no sigmoid, silu, softplus); sums
run along contiguous rows or in a written order. The factors of a batch of products lie at multiples of 16 bytes:
elsewhere MKL's kernels for AMD processors give other bits.
"""
