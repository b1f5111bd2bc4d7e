"""Shapes that every product in plain torch has, by role: a library picks its order of summation from the shape."""

TILE = 64  # positions a tile of keys covers, at absolute positions; block sizes divide it
DECODE_GROUP = 16  # rows of one product in a decode step; prefill takes TILE rows
