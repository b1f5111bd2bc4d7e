"""Work on rows of the residual stream: embedding, RMS norm with and without an addition before it, SwiGLU.

`definition` has norm and SwiGLU in torch, `rows` the kernels.
"""
