"""Expanded, causal attention of a prefill step.

`definition` has it in torch. `plan` is the host's layout of a step: which context is expanded when, and which query
tiles meet it. `attend` expands the segments and runs the kernel.
"""
