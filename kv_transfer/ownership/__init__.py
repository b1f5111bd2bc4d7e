"""Who is alive and who owns which blocks: records in a store that may be slow, wrong or gone. Never a fence."""
