"""Which planes a model's cache has. No torch."""

from typing import Final

LATENT: Final = "latent"  # the name of MLA's plane: each token's compressed keys and values, on every layer
