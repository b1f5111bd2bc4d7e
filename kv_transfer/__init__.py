"""Moves cache rows between workers over ZeroMQ and records in Redis who owns them. No torch: it speaks memoryview."""
