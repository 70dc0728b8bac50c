"""The folders that commands write into: a command replaces only what the same command wrote there.

`.lpl.json` in such a folder records for each command the names that were free, or already its own, when it first ran,
and the checksums of its results, which are replaced as a whole. Anything else under one of those names is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import UserError
from lpl.base.files import checksum, sync_file, write_atomically, write_output
from lpl.base.json_files import REST, TEXT, Shape, object_in, read_object, require_shape

RECORD = ".lpl.json"
RECORDED: Shape = {REST: {"names": [TEXT], "result": [TEXT], "files": {REST: [TEXT]}}}
"""Content of the record, by command."""
JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""Files that file managers leave; they are ignored."""
COMPONENT = re.compile(r".*\.(json|safetensors|model)|merges\.txt|vocab\.txt")
"""Files of a model in diffusers' format."""
ELSEWHERE = "move it away, or name another folder"
Proof = Callable[[Path], bool]


class Names(NamedTuple):
    """What a command writes: a name that ends in / is a folder's, # stands for a number."""

    kept: Mapping[str, Proof | None]
    """What is added to or rewritten, each with a test that tells lpl's own files without the record; None: no test."""
    results: tuple[str, ...] = ()
    """What `OutputFolder.put` replaces as a whole."""


class OutputFolder:
    """A folder as one command sees it: the path `within` the folder that the user has `given` by a flag."""

    def __init__(self, given: str | Path, command: str, within: str = "", flag: str = "--output_dir") -> None:
        self.given, self.command, self.flag = Path(given), command, flag
        self.folder = self.given / within

    def check(self, names: Names, adopt: Proof | None = None) -> None:
        """Refuses what is in the way; changes nothing.

        Args:
            names: what the command is going to write.
            adopt: says whether a version of this command that kept no records wrote something in the folder; asked
                only if there is no record.

        Raises:
            UserError: a link, a file in place of a folder or the reverse, or something this command did not write.
        """
        check_real(self.given, self.folder, self.flag)
        own = self._read()["names"]
        adopt = None if own else adopt
        for path, name in self._found(names.kept):
            self._check_kind(path, name)
            if not (name in own or _is_proved(path, names.kept[name], adopt)):
                raise self._foreign(path)
        self._check_results(names.results, adopt)

    def claim(self, names: Names, adopt: Proof | None = None) -> None:
        """Records these names as the command's own from now on, except those that something else has.

        Raises:
            UserError: the folder cannot be written.
        """
        record = self._read()
        adopt = None if record["names"] else adopt
        found = self._found(names.kept)
        taken = {name for path, name in found if not _is_proved(path, names.kept[name], adopt)}
        record["names"] = sorted({*record["names"]} | names.kept.keys() - taken)
        for path, _ in self._found(names.results):
            if adopt and adopt(path):
                record["files"] |= {self._name(file): [checksum(file)] for file in _files(path)}
        self._write(record)

    def put(self, staged: Mapping[str, Path], done: tuple[str, bytes] | None = None) -> None:
        """Moves files and folders to their names, in the place of those that this command put there before.

        Args:
            staged: what to move, by its name in the folder: the whole content of a temporary folder there, which is
                then removed, or files that already lie in the folder under another name.
            done: name and content of a file that says that all is in place; removed first and written last.

        Raises:
            UserError: something else has one of the names, and nothing was moved.
        """
        files = {str(Path(name) / f.relative_to(path)): f for name, path in staged.items() for f in _files(path)}
        new = {name: checksum(file) for name, file in files.items()}
        self._check_results([f"{name}/" if path.is_dir() else name for name, path in staged.items()], also=new)
        for file in files.values():
            sync_file(file)
        record = self._read()
        old = {name: known for name, known in record["files"].items() if name.split("/")[0] in staged}
        rest = {name: known for name, known in record["files"].items() if name not in old}
        # While a new file replaces an old one, the checksums of both are valid.
        record["files"] = rest | old | {name: [*old.get(name, []), value] for name, value in new.items()}
        self._write(record)
        if done is not None:
            (self.folder / done[0]).unlink(missing_ok=True)
        for name, path in staged.items():
            target = self.folder / name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        for parent in {path.parent for path in staged.values()} - {self.folder}:
            parent.rmdir()
        record["files"] = rest | {name: [value] for name, value in new.items()}
        if done is not None:
            record["result"] = sorted(staged)
        self._write(record)
        if done is not None:
            write_atomically(self.folder / done[0], done[1])

    def missing(self) -> str | None:
        """The first missing file of the last result; None: none is missing, or no result is recorded."""
        record = self._read()
        of_result = (name for name in record["files"] if name.split("/")[0] in record["result"])
        return next((name for name in of_result if not (self.folder / name).is_file()), None)

    @property
    def has_record(self) -> bool:
        """Whether this command has a record here; older versions kept none."""
        return bool(self._read()["names"])

    def _check_results(
        self, names: Iterable[str], adopt: Proof | None = None, also: Mapping[str, str] | None = None
    ) -> None:
        known = self._read()["files"]
        for path, name in self._found(names):
            self._check_kind(path, name)
            for file in _files(path):
                own = self._name(file)
                if file.is_symlink() or not file.is_file():
                    raise self._foreign(file)
                expected = {*known.get(own, []), (also or {}).get(own)} - {None}
                adopted = adopt and not expected and COMPONENT.fullmatch(file.name) and adopt(path)
                if not adopted and (not expected or checksum(file) not in expected):
                    raise self._foreign(file, changed=own in known)

    def _found(self, names: Iterable[str]) -> Iterator[tuple[Path, str]]:
        """The entries that have one of these names, each with that name."""
        there = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        for name in names:
            bare = name.removesuffix("/")
            if "#" in bare:
                yield from ((self.folder / entry, name) for entry in there if matches(name, entry))
            elif os.path.lexists(self.folder / bare):
                yield self.folder / bare, name

    def _check_kind(self, path: Path, name: str) -> None:
        check_real(self.folder, path, self.flag)
        if path.is_dir() != name.endswith("/"):
            found, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise UserError(
                f"{self.flag} {self.folder}: {path.name} in it is a {found}, where {self.command} writes a {wanted} of "
                f"that name: {ELSEWHERE}"
            )

    def _foreign(self, path: Path, changed: bool = False) -> UserError:
        told = "has been changed since {} wrote it" if changed else "is not what {} wrote there"
        found = f"{self._name(path)} in it {told.format(self.command)}"
        return UserError(f"{self.flag} {self.folder}: {found}, and would be replaced: {ELSEWHERE}")

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> dict[str, Any]:
        """This command's part of the record."""
        return {"names": [], "files": {}, "result": []} | self._all().get(self.command, {})

    def _all(self) -> dict[str, Any]:
        file = self.folder / RECORD
        found = read_object(file, then=ELSEWHERE) if file.is_file() else {}
        require_shape(found, RECORDED, str(file), ELSEWHERE)
        return found

    def _write(self, part: dict[str, Any]) -> None:
        content = json.dumps(self._all() | {self.command: part}, indent=1)
        write_output(self.folder / RECORD, content.encode(), f"{self.flag} {self.folder}")


def check_real(given: Path, path: Path, flag: str) -> None:
    """Raises UserError where a part of a path below the folder that the user named is a symbolic link."""
    part = given
    for name in path.relative_to(given).parts:
        part /= name
        if part.is_symlink():
            found = f"{part.relative_to(given).as_posix()} in it is a symbolic link (to {os.readlink(part)})"
            raise UserError(f"{flag} {given}: {found}: {ELSEWHERE}")


def check_apart(given: Path, names: Iterable[str], inputs: Mapping[str, str | None], same: bool = True) -> None:
    """Refuses an output that would overwrite an input of the command, even if their paths are spelt differently.

    Args:
        given: the folder that is written to.
        names: as in Names.
        inputs: what is read, by flag: a file, a folder, or neither (a Hub id).
        same: whether the folder itself is refused as an input, too.

    Raises:
        UserError: an input is the folder, or lies where one of the names goes.
    """
    for option, value in inputs.items():
        path = Path(value) if value else None
        if path is None or not path.exists():
            continue
        remedy = f"--{option} {value} would be overwritten: name another folder"
        if same and _same(path, given):
            raise UserError(f"--output_dir {given}: is the same folder, so {remedy}")
        above = [path.resolve(), *path.resolve().parents]
        for name in names:
            for part, parent in pairwise(above):
                if (matches(name, part.name) and _same(parent, given)) or _same(given / name, part):
                    raise UserError(f"--output_dir {given}: {part.name} in it is written to, so {remedy}")


def matches(name: str, entry: str) -> bool:
    """Whether an entry of a folder has one of the names that Names describes."""
    return re.fullmatch(re.escape(name.removesuffix("/")).replace(r"\#", r"\d+"), entry) is not None


def kind_of(path: Path) -> str | None:
    """The kind that a JSON file of lpl states, such as "eval"; None: it is no such file."""
    content = object_in(path)
    return str(content["kind"]) if content.keys() >= {"lpl", "kind"} else None


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or all files in a folder and its subfolders, without junk; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for entry in sorted(path.iterdir()):
        if entry.name not in JUNK:
            yield from _files(entry)


def _is_proved(path: Path, *proofs: Proof | None) -> bool:
    """Whether something that the record does not name may be replaced all the same; an empty folder may."""
    is_empty = path.is_dir() and next(_files(path), None) is None
    return is_empty or any(proof(path) for proof in proofs if proof is not None)
