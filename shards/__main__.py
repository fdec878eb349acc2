"""`python -m shards verify|inspect|preview|stats|export DIR`."""

import importlib
import sys

from shards.cli import main_guard, parse
from shards.errors import InputError

COMMANDS = {
    "verify": "VerifyConfig",
    "inspect": "InspectConfig",
    "preview": "PreviewConfig",
    "stats": "StatsConfig",
    "export": "ExportConfig",
}
"""Command -> its config; both it and `run` live in the module of the command's name."""


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    with main_guard("shards"):
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; valid: {', '.join(COMMANDS)} (python -m shards verify DIR)")
        module = importlib.import_module(f"shards.{name}")
        module.run(parse(getattr(module, COMMANDS[name]), rest, prog=f"python -m shards {name}"))


if __name__ == "__main__":
    main()
