"""Rebuild the small checkpoint in `isthmus/bundled`: corpus, synthetic text, training, evaluation, export."""
