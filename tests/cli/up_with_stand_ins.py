"""`isthmus up` whose services are stand-ins: `python up_with_stand_ins.py MODE [flags of isthmus up]`."""

import sys
from dataclasses import replace
from pathlib import Path

from isthmus import cli
from isthmus.cli import stack_plan, up
from isthmus.cli.stack_plan import ChildSpec, Ports, StackSpec

_STAND_IN = str(Path(__file__).with_name("stand_in.py"))


def planned(spec: StackSpec, ports: Ports, state_dir: Path) -> list[ChildSpec]:
    return [_stand_in(child) for child in stack_plan.plan(spec, ports, state_dir)]


def _stand_in(child: ChildSpec) -> ChildSpec:
    if child.role == "redis":
        return child
    mode = sys.argv[1] if child.name == "decode-0" else "serve"
    flags = child.command[child.command.index("--name") :]
    return replace(child, command=(sys.executable, _STAND_IN, mode, *flags))


if __name__ == "__main__":
    up.plan = planned
    sys.exit(cli.main(["up", *sys.argv[2:]]))
