"""Where weight files lie: a path, a folder, or the Hugging Face cache. Only `fetch` ever touches a network.

A file of the hub is written hub:ORG/REPO/FILE. `HF_HOME` or `HF_HUB_CACHE` say where the cache is, `HF_ENDPOINT` which
hub is asked, `HF_TOKEN` by whom, as in every program that uses `huggingface_hub`.
"""

from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError

SCHEME = "hub:"
NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin", "ViT-B-32.pt"),
)
"""What weight files of timm's, open_clip's and OpenAI's are called, the preferred ones first."""


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
        return _in_folder(Path(source), option) if Path(source).is_dir() else Path(source)
    found = file.cached()
    if found is None:
        raise InputError(
            f"{file.repository}/{file.name}, which {option} asks for, is not in the Hugging Face cache "
            f"{cache_folder()}: where there is network, run `python -m train.weights fetch {preset}`, or name a file "
            f"with {option} PATH, or start from chance with {option} none"
        )
    return found


def _in_folder(folder: Path, option: str) -> Path:
    """The weight file in a folder: a plain one, a repository of the cache, or a cache that has one repository."""
    if not (folder / "snapshots").is_dir():
        repositories = sorted(folder.glob("models--*"))
        if len(repositories) > 1:
            raise InputError(
                f"{option} {folder} is a cache of {len(repositories)} models: name one of the folders in it"
            )
        if repositories:
            return _in_folder(repositories[0], option)
    for name in NAMES:
        if (_snapshot(folder) / name).is_file():
            return _snapshot(folder) / name
    raise InputError(f"{option} {folder} holds no weight file: none of {', '.join(NAMES)}")


def _snapshot(folder: Path) -> Path:
    """The files of a repository in the cache: those of refs/main, or the only ones; another folder is its own."""
    revisions = sorted((folder / "snapshots").glob("*"))
    main = folder / "refs" / "main"
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()) in revisions:
        return named
    return revisions[0] if len(revisions) == 1 else folder


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
