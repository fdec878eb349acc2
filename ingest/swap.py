"""Replace many files of a folder in one step, on a file system that can rename only one at a time.

FOLDER/WORK/new holds the new files. Then, each step on the disk before the next:

1. `old/` receives hard links to the present files, `current` is a symbolic link to `old`;
2. each file becomes, one by one, a symbolic link to `WORK/current/NAME`: the same contents as before;
3. `current` is replaced by a link to `new`: this one rename makes all files the new ones;
4. each link is replaced by the new file itself.

Whatever is killed when, whoever opens the files sees all old or all new ones. `finish` or `undo` cleans up.
"""

import os
import shutil
from pathlib import Path

from shards.atomic import TEMPORARY_PREFIX, atomic_file, sync_folder

_CURRENT = "current"


class Swap:
    """The swap of one folder. `new` is made at once; the caller fills it with complete files."""

    def __init__(self, folder: Path, work: str) -> None:
        self._folder = folder
        self.work = folder / work
        self.new, self._old = self.work / "new", self.work / "old"

    def begin(self) -> None:
        """Make the work folder, or keep what is in it."""
        self.new.mkdir(parents=True, exist_ok=True)

    @property
    def committed(self) -> bool:
        """Whether step 3 is behind an interrupted swap: it can only be finished."""
        return self._points_to() == self.new.name

    def run(self) -> None:
        """Make the files in `new` those of the folder; an interrupted run is continued."""
        names = sorted(os.listdir(self.new))
        sync_folder(self.new)
        self._old.mkdir(exist_ok=True)
        for name in names:
            _keep(self._folder / name, self._old / name)
        sync_folder(self._old)
        self._point_to(self._old)
        for name in names:
            self._link(Path(self.work.name, _CURRENT, name), self._folder / name)
        sync_folder(self._folder)
        self._point_to(self.new)
        self.finish()

    def finish(self) -> None:
        """Step 4, and away with the work folder."""
        self._replace_links(self.new)

    def undo(self) -> None:
        """Back to the files as they were, for a swap that is not committed."""
        self._replace_links(self._old)

    def _replace_links(self, origin: Path) -> None:
        for path in sorted(origin.iterdir()) if origin.is_dir() else []:
            if (self._folder / path.name).is_symlink():
                os.replace(path, self._folder / path.name)
        sync_folder(self._folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def _points_to(self) -> str | None:
        try:
            return os.readlink(self.work / _CURRENT)
        except OSError:
            return None

    def _point_to(self, target: Path) -> None:
        self._link(Path(target.name), self.work / _CURRENT)
        sync_folder(self.work)

    def _link(self, target: Path, path: Path) -> None:
        """Put a symbolic link in the place of `path`, in one step. What a kill leaves lies in the work folder."""
        temporary = self.work / f"{TEMPORARY_PREFIX}link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, path)


def _keep(path: Path, copy: Path) -> None:
    """Give a file a second name, unless it has it from an interrupted run."""
    if path.is_symlink() or copy.exists():
        return
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic_file(copy) as target:
            shutil.copyfileobj(source, target)
