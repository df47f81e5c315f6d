"""Datasets of Hugging Face as they lie on disk: what `save_to_disk` wrote, or a snapshot of parquet files."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from capa_export.base.errors import CapaError, ExitCode, first_line, how_to_install
from capa_export.data.picture_files import PICTURE_SUFFIXES

__all__ = ["Table", "is_dataset", "open_folder"]

_SHARD = re.compile(r"-\d+-of-\d+.*$|\.parquet$")
_PICTURES = ("image", "images")


@dataclass(frozen=True)
class Table:
    """The rows of one part of a dataset."""

    name: str
    """Name for people: the folder, and the part of it."""
    folder: Path
    """Folder that paths of pictures are relative to."""
    rows: Any
    """A `datasets.Dataset`, its pictures not decoded."""
    pictures_apart: "Any | None" = None
    """Separate table of the pictures, where there is one, as GQA's."""
    place: Mapping[str, int] | None = None
    """Picture id -> row of `pictures_apart`."""

    @property
    def columns(self) -> Sequence[str]:
        return self.rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def pictures(self, row: Mapping[str, Any]) -> list[bytes]:
        """The encoded files of a row's pictures.

        Raises:
            CapaError: one of them is missing.
        """
        if self.pictures_apart is not None and self.place is not None:
            if row["imageId"] not in self.place:
                raise CapaError(f"picture {row['imageId']} is not among those of the dataset")
            row = self.pictures_apart[self.place[row["imageId"]]]
        found = next((row[name] for name in _PICTURES if row.get(name) is not None), [])
        return [_bytes(picture, self.folder) for picture in (found if isinstance(found, list) else [found])]


def _bytes(picture: object, folder: Path) -> bytes:
    """The bytes of an undecoded Image feature, or of base64 as tables of text have it."""
    if isinstance(picture, dict):
        if picture.get("bytes"):
            return picture["bytes"]
        try:
            return (folder / picture["path"]).read_bytes()
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CapaError(f"its picture {picture.get('path') or ''} is missing".replace("  ", " ")) from error
    try:
        return picture if isinstance(picture, bytes) else base64.b64decode(str(picture), validate=True)
    except binascii.Error as error:
        raise CapaError("its picture is neither bytes nor base64") from error


@dataclass(frozen=True)
class _Part:
    columns: Sequence[str]
    load: Callable[[], Any]


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a dataset, or nothing that could be taken for pictures."""
    if not folder.is_dir():
        return False
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    return ".parquet" in suffixes or any(folder.rglob("state.json")) or not suffixes & PICTURE_SUFFIXES


def open_folder(folder: Path, split: str | None = None) -> Table:
    """The part of a dataset that asks questions.

    Args:
        folder: searched with its subfolders.
        split: the part, where several ask; as `validation`, or with its folder as `data/validation`.

    Raises:
        CapaError: there is none, or not the one, or several and nothing says which.
    """
    try:
        import datasets
    except ImportError as error:
        raise CapaError(f"folders of datasets need: {how_to_install('evaluate')}", ExitCode.USAGE) from error
    datasets.disable_progress_bars()
    parts = _parts(folder)
    if not parts:
        raise CapaError(f"{folder}: holds no dataset: neither parquet files nor what save_to_disk writes")
    asking = {name: part for name, part in parts.items() if "question" in part.columns}
    if not asking:
        columns = sorted({column for part in parts.values() for column in part.columns})
        raise CapaError(f"{folder}: asks nothing: it has no column 'question', but {', '.join(columns)}")
    found = [name for name in asking if split is None or split in (name, name.rpartition("/")[-1])]
    if len(found) != 1:
        wrong = "has several parts" if split is None or found else f"has no part {split!r}"
        raise CapaError(f"{folder}: {wrong}; choose one with --split: {', '.join(found or asking)}", ExitCode.USAGE)
    name = found[0]
    rows = _keep_bytes(asking[name].load())
    title = f"{folder} ({name})" if name else str(folder)
    if "imageId" not in rows.column_names or set(_PICTURES) & set(rows.column_names):
        return Table(title, folder, rows)
    apart = _keep_bytes(parts[_pictures_of(folder, name, parts)].load())
    return Table(title, folder, rows, apart, {picture: index for index, picture in enumerate(apart["id"])})


def _pictures_of(folder: Path, name: str, parts: Mapping[str, _Part]) -> str:
    """The part with the pictures that another part's questions are about."""
    shown = [other for other, part in parts.items() if {"id", "image"} <= set(part.columns) and other != name]
    beside = name.replace("instructions", "images")
    if beside in shown:
        return beside
    if len(shown) == 1:
        return shown[0]
    raise CapaError(f"{folder}: the pictures of {name} should lie in {beside}; copy that folder of the dataset, too")


def _parts(folder: Path) -> dict[str, _Part]:
    """The parts of a dataset by name, which is empty where there is only one."""
    import datasets

    saved = sorted(path.parent for path in folder.rglob("state.json"))
    if saved:
        try:
            tables = {path: datasets.load_from_disk(str(path)) for path in saved}
        except (OSError, ValueError, KeyError) as error:
            raise CapaError(f"{folder}: what save_to_disk wrote does not open ({error}); copy it again") from error
        names = {path: path.relative_to(folder).as_posix().removeprefix(".") for path in saved}
        return {names[path]: _Part(list(table.column_names), partial(_itself, table)) for path, table in tables.items()}
    import pyarrow as pa
    from pyarrow import parquet

    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        files.setdefault(_SHARD.sub("", path.relative_to(folder).as_posix()), []).append(str(path))
    try:
        return {
            name: _Part(parquet.read_schema(paths[0]).names, partial(_of_parquet, paths))
            for name, paths in files.items()
        }
    except (pa.ArrowException, OSError) as error:
        raise CapaError(f"{folder}: a parquet file does not open ({error}); download it again") from error


def _itself(table: Any) -> Any:
    return table


def _of_parquet(paths: Sequence[str]) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset("parquet", data_files=list(paths), split="train")
    except DatasetsError as error:
        raise CapaError(f"{paths[0]}: does not load ({first_line(error)}); download it again") from error


def _keep_bytes(table: Any) -> Any:
    """The table with the files' bytes in place of decoded pictures."""
    from datasets import Image, List

    for name in set(_PICTURES) & set(table.column_names):
        feature = table.features[name]
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table
