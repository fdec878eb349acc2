"""A run's first weights: which files, where they are, and into the model with them.

`python -m train.weights show|fetch PRESET` says which a preset starts from and whether they are there, and gets them.

A file of the hub is written hub:ORG/REPO/FILE. Training never touches a network; `fetch` fills the Hugging Face cache
on a machine that has one, a login node say. `HF_HOME` or `HF_HUB_CACHE` say where the cache is, `HF_ENDPOINT` which hub
is asked, `HF_TOKEN` by whom, as in every program that uses `huggingface_hub`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from shards.cli import main_guard, parse, say
from shards.digest import file_digest
from shards.errors import InputError
from train.config import TrainConfig
from train.presets import PRESETS

if TYPE_CHECKING:  # `show` and the help need no torch
    from train.model import ClipModel

SCHEME, NONE = "hub:", "none"
NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin", "ViT-B-32.pt", "best.pt"),
)
"""What weight files of timm's, open_clip's, OpenAI's and of our runs are called, the preferred ones first."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model repository."""

    repository: str
    """ORG/REPO."""
    name: str
    """Its name there."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}/{self.name}"

    def cached(self) -> Path | None:
        """Where it lies in the cache, None where it does not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.name)
        return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def parse_hub(source: str) -> HubFile | None:
    """hub:ORG/REPO/FILE as a HubFile, None for anything that does not begin so. InputError where a part is missing."""
    if not source.startswith(SCHEME):
        return None
    parts = source.removeprefix(SCHEME).split("/")
    if len(parts) != 3 or not all(parts) or ".." in parts:
        raise InputError(f"{source} is not of the form hub:ORG/REPO/FILE")
    return HubFile("/".join(parts[:2]), parts[2])


def cache_folder() -> Path:
    """The Hugging Face cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def find_weights(source: str, *, option: str, preset: str) -> Path:
    """The file that a --vision-weights or --text-weights means. InputError says where it was looked for."""
    file = parse_hub(source)
    if file is None:
        if not Path(source).exists():
            raise InputError(
                f"{option} {source} is not there; name a weight file, a run's folder, or hub:ORG/REPO/FILE"
            )
        return _in_folder(Path(source), option) if Path(source).is_dir() else Path(source)
    found = file.cached()
    if found is None:
        what = preset if preset in PRESETS and file in files_of(preset) else file
        raise InputError(
            f"{file.repository}/{file.name}, which {option} asks for, is not in the Hugging Face cache "
            f"{cache_folder()}: where there is network, run `python -m train.weights fetch {what}`, or name a file "
            f"with {option} PATH, or start from chance with {option} none"
        )
    return found


def load_pretrained(model: "ClipModel", config: TrainConfig) -> list[str]:
    """Give each tower the weights that its setting names; a line on each, for people. For a run's beginning only.

    InputError where a file is missing, is refused, or does not fit: no weight has changed in a tower then.
    """
    from train.pretrained import Tensors, load_tower, read_tensors

    told, read = [], dict[Path, Tensors]()
    for name, option, source in (
        ("image", "--vision-weights", config.vision_weights),
        ("text", "--text-weights", config.text_weights),
    ):
        if source == NONE:
            continue
        path = find_weights(source, option=option, preset=config.preset)
        if path not in read:
            read = {path: read_tensors(path)}  # at most one file in memory
        count = load_tower(getattr(model, name), read[path], text=name == "text", what=f"{option} {path}")
        told.append(f"{name} tower: {count} tensors from {path}")
    return told


def _in_folder(folder: Path, option: str) -> Path:
    """The weight file in a folder, that of a run of ours say."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{option} {folder} holds no weight file: none of {', '.join(NAMES)}")


def fetch(file: HubFile) -> Path:
    """Download a file into the cache, once. InputError, in one line, where the hub does not give it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # its retries, five lines of them
    try:
        return Path(hf_hub_download(file.repository, file.name))
    except GatedRepoError:
        raise InputError(
            f"{file.repository} is given only to those who accepted its licence: do so on its page, then set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        reason = type(error.__cause__ or error).__name__
        raise InputError(f"the hub cannot be reached for {file} ({reason}); run this where there is network") from None
    except Exception as error:  # the client and what carries it raise errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} could not be fetched ({type(error).__name__}: {reason})") from None


PROG = "train.weights"
COMMANDS = ("show", "fetch")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weight files of a preset: where they were looked for (show), or into the Hugging Face cache (fetch)."""

    what: tyro.conf.Positional[str]
    """A preset, or hub:ORG/REPO/FILE."""


def files_of(what: str) -> list[HubFile]:
    """The files of the hub that a preset starts from, or the one that is named. InputError for an unknown name."""
    if (named := parse_hub(what)) is not None:
        return [named]
    if what not in PRESETS:
        raise InputError(f"unknown preset {what!r}; valid: {', '.join(PRESETS)}, or hub:ORG/REPO/FILE")
    config = PRESETS[what]()
    files = [parse_hub(source) for source in (config.vision_weights, config.text_weights)]
    return list(dict.fromkeys(file for file in files if file is not None))


def show(what: str) -> None:
    """Say of each file whether it is in the cache."""
    files = files_of(what)
    say(f"the Hugging Face cache is {cache_folder()}")
    if not files:
        say(f"{what} starts from chance: it needs no weights")
    for file in files:
        found = file.cached()
        say(f"{file}: {f'{found}, {found.stat().st_size:,} bytes' if found else 'missing'}")
    if any(file.cached() is None for file in files):
        say(f"where there is network: python -m {PROG} fetch {what}")


def fetch_all(what: str) -> None:
    """Download what is missing, and read each file once, as training will."""
    from train.pretrained import read_tensors

    files = files_of(what)
    if not files:
        show(what)
    for file in files:
        path = fetch(file)
        tensors = read_tensors(path)
        say(f"{file}: {path}, {len(tensors)} tensors, {path.stat().st_size:,} bytes, xxh3 {file_digest(path)}")


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exit code 2 for a user's mistake."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    with main_guard(PROG):
        if name in ("-h", "--help"):
            say(f"usage: python -m {PROG} {{{','.join(COMMANDS)}}} PRESET   (PRESET: {', '.join(PRESETS)})")
            return
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; valid: show, fetch (python -m {PROG} show cxr-dinov3-clip)")
        config = parse(WeightsConfig, rest, prog=f"python -m {PROG} {name}")
        (show if name == "show" else fetch_all)(config.what)


if __name__ == "__main__":
    main()
