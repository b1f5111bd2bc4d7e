"""Operations of the token path: plain torch definitions (`ref`). Imports nothing of this project."""
