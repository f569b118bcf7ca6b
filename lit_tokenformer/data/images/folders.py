"""Labeled images in folders and tar files: splits, classes, and what is left out.

timm's folder reader takes hidden folders for classes and numbers classes in natural order, which would relabel existing
checkpoints; workers share the file position of its tar reader, and its WebDataset reader draws from a shuffle buffer.
Here every image has an index, in a tar file as in a folder, so a resume is exact for all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_tokenformer.data.hub import is_within
from lit_tokenformer.data.images.samples import UNLABELED, FileSamples, image_extensions
from lit_tokenformer.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of each split, as in ``datasets.data_files.SPLIT_KEYWORDS`` of Hugging Face."""


class Entry(NamedTuple):
    """File in a folder, or member of a tar file."""

    name: str
    """Path within the split, with ``/``; a tar file counts as a folder of its stem."""
    path: str
    """Path of the file, or of the tar file and the member."""
    span: tuple[int, int, int] = (0, 0, 0)
    """Position in a tar file, see :class:`FileSamples`."""


@dataclass(eq=False, repr=False)
class Files:
    """Files below a root; counts what it leaves out."""

    root: str
    """Folder that links must not leave, unless ``follow_links``."""
    follow_links: bool = False
    setting: str = "data.root"
    """Name of the setting, for errors."""
    left_out: Counter[str] = field(default_factory=Counter)
    folders: set[str] = field(default_factory=set)
    """Names of the top folders that were walked."""

    def __post_init__(self) -> None:
        self.root = os.path.realpath(self.root)

    def listed(self, folder: str, above: tuple[str, ...] = ()) -> list[os.DirEntry[str]]:
        """List a folder in order, with the resolved paths of the folder and of those that led to it."""
        found = sorted(os.scandir(folder), key=lambda one: one.name)
        reasons = [self._reason(one, above) for one in found]
        self.left_out.update(filter(None, reasons))
        return [one for one, reason in zip(found, reasons, strict=True) if not reason]

    def walk(self, folder: str, name: str = "", above: tuple[str, ...] = ()) -> Iterator[Entry]:
        """Yield the files in a folder and in its tar files, at any depth."""
        above = (*above, os.path.realpath(folder))
        for one in self.listed(folder, above):
            if one.is_dir():
                self.folders.update([] if name else [one.name])
                yield from self.walk(one.path, f"{name}{one.name}/", above)
            else:
                yield from self.open(one.path, name)

    def open(self, path: str, name: str = "") -> Iterator[Entry]:
        """Yield a file, or the members of a tar file."""
        base = os.path.basename(path)
        if not base.endswith(".tar"):
            yield Entry(name + base, path)
            return
        try:
            with tarfile.open(path, "r:") as tar:
                yield from self._members(tar, path, f"{name}{base[:-4]}/")
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{self.setting}: {path}: not an intact tar file ({error})") from None

    def _members(self, tar: tarfile.TarFile, path: str, name: str, start: int = 0) -> Iterator[Entry]:
        """Yield the members of a tar file, or of one that begins within it at an offset in bytes."""
        for one in tar:
            member = os.path.normpath(one.name).lstrip("/")
            if any(is_hidden(part) for part in member.split("/")[member == "." :]):
                self.left_out["hidden files"] += one.isreg()
            elif one.isreg() and member.endswith(".tar"):
                with tarfile.open(fileobj=tar.extractfile(one), mode="r:") as inner:
                    yield from self._members(inner, path, f"{name}{member[:-4]}/", start + one.offset_data)
            elif one.isreg() and not one.issparse():
                span = len(os.fsencode(path)), start + one.offset_data, one.size
                yield Entry(name + member, f"{path}/{member}", span)
            elif not one.isdir():
                self.left_out["links in tar files"] += 1

    def _reason(self, one: os.DirEntry[str], above: tuple[str, ...]) -> str:
        """Return the reason to leave a file out, empty for none."""
        if is_hidden(one.name):
            return f"hidden {'folders' if one.is_dir() else 'files'}"
        if one.is_symlink():
            real = os.path.realpath(one.path)
            if not os.path.exists(real):
                return "broken links"
            if real in above:
                return "links to a folder above"
            if not self.follow_links and not is_within(real, (self.root,)):
                return "links out of data.root (followed with data.follow_links: true)"
        if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", one.name):
            return "compressed tar files (without random access; decompress them)"
        return "" if one.is_dir() or one.is_file() else "pipes and devices"

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()) if count)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is left out, as by Hugging Face's loaders (``.cache``, ``__MACOSX``)."""
    return name.startswith((".", "__"))


def find_images(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], setting: str) -> FileSamples:
    """Find all images in folders, nested or flat, or in tar files, sorted by path within each, with the label -1.

    Raises:
        ValueError: If a path does not exist or contains no image.
    """
    images: list[Entry] = []
    for root in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        root = os.fspath(root)
        if not (os.path.isfile(root) or os.path.isdir(root)):
            raise UserError(f"{setting}: no such folder or file: {root}")
        files = Files(root, follow_links=True, setting=setting)
        if os.path.isfile(root) and not root.endswith(".tar"):  # whatever its extension
            images += files.open(root)
            continue
        found, _ = _images(files.walk(root) if os.path.isdir(root) else files.open(root), files)
        if not found:
            raise UserError(f"{setting}: no images in {root}{_hints(files)}")
        images += sorted(found, key=lambda entry: entry.path)
        _report(root, files)
    return _samples(images, [UNLABELED] * len(images))


def open_folder(root: str, follow_links: bool = False) -> tuple[list[str], dict[str, FileSamples]]:
    """Find the splits and classes of a folder or tar file.

    The root contains ``SPLIT/CLASS/IMAGE`` or ``CLASS/IMAGE`` (a training split), where a tar file may replace any
    folder, or WebDataset shards (tar files with ``KEY.cls``) that contain the name of their split.

    Returns:
        Class names, and the samples of train and, if present, val and test. Images of a test split without classes
        have the label -1.

    Raises:
        ValueError: If a split has no images, or other classes than the training split.
    """
    files = Files(root, follow_links)
    class_names: list[str] = []
    samples: dict[str, FileSamples] = {}
    for split, (place, entries) in _places(root, files).items():
        files.folders.clear()
        images, labels, sharded = _labeled(entries, files)
        names = {*filter(None, labels), *files.folders}
        if split == "test" and images and not names:
            samples[split] = _samples(images, [UNLABELED] * len(images))
            continue
        if not names:
            raise UserError(f"data.root: no class folders in {place}; expected {place}/CLASS/IMAGE{_hints(files)}")
        if split == "train":
            numeric = sharded and all(name.isdecimal() for name in names)
            class_names = sorted(names, key=int if numeric else str)  # type: ignore[arg-type]
        elif odd := sorted(names - {*class_names} if sharded else names ^ {*class_names}):
            raise UserError(
                f"data.root: train and {split} have different classes, {len(odd)} are in one of them only: {few(odd)}"
            )
        kept = [(image, label) for image, label in zip(images, labels, strict=True) if label]
        files.left_out["images without a class"] += len(images) - len(kept)
        if not kept:
            raise UserError(f"data.root: no images in {place}{_hints(files)}")
        numbers = {name: number for number, name in enumerate(class_names)}
        samples[split] = _samples([image for image, _ in kept], [numbers[label] for _, label in kept])
    if empty := sorted(set(range(len(class_names))) - set(samples["train"].labels.tolist())):
        found = f"{len(empty)} classes: {few([class_names[number] for number in empty])}"
        raise UserError(f"data.root: no training images for {found}{_hints(files)}")
    _report(root, files)
    return class_names, samples


def few(names: list[str]) -> str:
    """Join at most five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _places(root: str, files: Files) -> dict[str, tuple[str, Iterable[Entry]]]:
    """Find the path and the files of each split, the training split first."""
    found: dict[str, list[tuple[str, Iterable[Entry]]]] = {}
    if os.path.isdir(root):
        for one in files.listed(root):
            # a tar file names its split anywhere: imagenet-train-0001.tar
            split = _split_of([one.name] if one.is_dir() else re.split("[^a-z]+", one.name.lower()))
            if one.is_dir() or one.name.endswith(".tar"):
                entries = files.walk(one.path) if one.is_dir() else _inside(files.open(one.path))
                found.setdefault(split, []).append((one.path, entries))
    else:
        whole = [*_inside(files.open(root))]
        while len({_top(entry) for entry in whole}) == 1 and _top(whole[0]) != whole[0].name:
            whole = [*_inside(whole)]  # a folder around the data set
        for top, group in itertools.groupby(sorted(whole, key=_top), key=_top):
            found.setdefault(_split_of([top]), []).append((f"{root}/{top}", [*_inside(group)]))
    nameless = found.pop("", [])
    if not found and os.path.isdir(root):
        files.left_out.clear()
    if not found:
        return {"train": (root, files.walk(root) if os.path.isdir(root) else whole)}
    for split, parts in found.items():
        if folders := [part for part in parts if not part[0].endswith(".tar")]:
            files.left_out["tar files of a split with a folder"] += len(parts) - len(folders)
            found[split] = folders
        if len(folders) > 1:
            raise UserError(f"data.root: several {split} splits: {few([path for path, _ in folders])}")
    if "train" not in found:
        raise UserError(f"data.root: no folder train in {root}; expected {root}/train/CLASS/IMAGE")
    files.left_out["folders or tar files that name no split"] += len(nameless)
    joined = {split: itertools.chain.from_iterable(entries for _, entries in found[split]) for split in found}
    return {split: (found[split][0][0], joined[split]) for split in SPLITS if split in found}


def _split_of(words: list[str]) -> str:
    """Return the split that one of the words names, empty for none."""
    return next((split for word in words for split, names in SPLITS.items() if word.lower() in names), "")


def _top(entry: Entry) -> str:
    return entry.name.partition("/")[0]


def _inside(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries without the top folder of their names."""
    return (entry._replace(name=entry.name.partition("/")[2]) for entry in entries)


def _images(entries: Iterable[Entry], files: Files) -> tuple[list[Entry], dict[str, Entry]]:
    """Return the images, and the labels of WebDataset shards by key."""
    images: list[Entry] = []
    labels: dict[str, Entry] = {}
    for entry in entries:
        key, ending = os.path.splitext(entry.path)  # shards may repeat names
        if ending.lower() in image_extensions():
            images.append(entry)
        elif ending == ".cls" or (ending == ".json" and entry.span[0] and key not in labels):
            labels[key] = entry
        else:
            files.left_out[f"files with the extension {ending.lower() or '(none)'}"] += 1
    return images, labels


def _labeled(entries: Iterable[Entry], files: Files) -> tuple[list[Entry], list[str | None], bool]:
    """Return the images and their classes, and whether those are of WebDataset shards.

    The class is the top folder of a file, and the folder of a member of a tar file, as for timm's readers.
    """
    images, found = _images(entries, files)
    classes = {key: text for key, entry in found.items() if (text := _class_in(entry)) is not None}
    if classes:
        return images, [classes.get(os.path.splitext(image.path)[0]) for image in images], True
    places = [image.name.rpartition("/")[0] for image in images]
    labels = [
        (place.rpartition("/")[2] if image.span[0] else place.partition("/")[0]) or None
        for image, place in zip(images, places, strict=True)
    ]
    order = sorted(range(len(images)), key=lambda number: (labels[number] or "", places[number], images[number].name))
    return [images[number] for number in order], [labels[number] for number in order], False


def _class_in(entry: Entry) -> str | None:
    """Read the class in ``KEY.cls``, or in the field ``label`` of ``KEY.json``; None without one or for -1."""
    length, offset, size = entry.span
    with open(os.fsencode(entry.path)[: length or None], "rb") as file:
        file.seek(offset)
        content = file.read(size if length else -1)
    text = ""
    with suppress(ValueError, AttributeError):  # of another format
        text = content.decode().strip() if entry.path.endswith(".cls") else str(json.loads(content).get("label", ""))
    return None if text in ("", "-1", "None") else text


def _samples(images: list[Entry], labels: list[int]) -> FileSamples:
    return FileSamples([image.path for image in images], labels, np.array([image.span for image in images]))


def _hints(files: Files) -> str:
    left_out = f"; left out: {files}" if str(files) else ""
    return f"; known extensions: {', '.join(sorted(image_extensions()))}{left_out}"


def _report(root: str, files: Files) -> None:
    if str(files):
        rank_zero_info(f"{files.setting}: {root}: left out {files}")
