"""Starts a child that dies with its parent: `python child_launcher.py SIGNAL PARENT COMMAND...`; standard library only.

A program of its own instead of a preexec_fn, which is unsafe once the parent has threads.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    signal_number = int(argv[1])
    parent = int(argv[2])
    command = argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the signal was asked for
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - an argument list, no shell


if __name__ == "__main__":
    main(sys.argv)
