"""The files of a run: RUN/config.json, versions.json, metrics.jsonl, checkpoints/, best.pt, requeue, forced.txt, lock,
curves.png, tensorboard/.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from shards.atomic import write_atomic
from shards.errors import InputError
from train.checkpoint import remove_leftovers
from train.commandline import config_json
from train.config import TrainConfig
from train.versions import versions


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Names within a run's folder."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of step-NNNNNNN.pt."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation loss."""
        return self.root / "best.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved settings; `--config` reads them back."""
        return self.root / "config.json"

    @property
    def requeue(self) -> Path:
        """There when the run was stopped before its end and wants to be started again with --resume auto."""
        return self.root / "requeue"

    @property
    def curves(self) -> Path:
        """Loss and speed over the steps."""
        return self.root / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def forced(self) -> Path:
        """What --force went over, a line each."""
        return self.root / "forced.txt"

    def note_forced(self, step: int, what: str) -> None:
        """Leave a lasting note that the run went on from a step with something changed."""
        with open(self.forced, "a", encoding="utf-8") as file:
            file.write(f"after step {step}: {what}\n")

    def check_free(self) -> None:
        """InputError where a run is here already: a second one would mix its files with the first one's."""
        if self.config.exists() or self.checkpoints.exists() or self.metrics.exists():
            raise InputError(f"{self.root} holds a run already; add --resume auto to go on, or choose another --out")

    def prepare(self, config: TrainConfig) -> None:
        """Make the folder and write settings and versions; clears what a stopped or killed run left."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, self.checkpoints):
                remove_leftovers(folder)
            write_atomic(self.config, config_json(config).encode())
            write_atomic(self.root / "versions.json", (json.dumps(versions(), indent=1) + "\n").encode())
            self.requeue.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the run's folder {self.root} ({error.strerror})") from None
