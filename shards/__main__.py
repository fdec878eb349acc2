"""`python -m shards verify|inspect|preview|stats|export DIR`."""

import importlib
import sys

from shards.cli import main_guard, parse, say
from shards.errors import InputError

COMMANDS = {
    "verify": "VerifyConfig",
    "inspect": "InspectConfig",
    "preview": "PreviewConfig",
    "stats": "StatsConfig",
    "export": "ExportConfig",
}
"""Command -> its config; both it and `run` live in the module of the command's name."""


_USAGE = f"usage: python -m shards {{{','.join(COMMANDS)}}} DIR ...   (python -m shards COMMAND --help says more)"


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    with main_guard("shards"):
        if name in ("-h", "--help"):
            say(_USAGE)
            return
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; valid: {', '.join(COMMANDS)} (python -m shards verify DIR)")
        module = importlib.import_module(f"shards.{name}")
        module.run(parse(getattr(module, COMMANDS[name]), rest, prog=f"python -m shards {name}"))


if __name__ == "__main__":
    main()
