"""PyTorch's own files, a zip or pickles in a row, read without executing anything they name.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other name. Training programs put
their settings beside the tensors: what those hold (STAND_INS) is replaced by inert classes of this file, so that
the checkpoint opens and still nothing outside torch and this file is called.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..support.text import printable
from .checkpoint import WeightsError, some

#: Names that checkpoints hold beside their tensors; their values are read over.
STAND_INS = (
    ("argparse", "Namespace"),  # timm, DeiT, MAE, DINO
    ("types", "SimpleNamespace"),
    *((f"pathlib{part}", f"{kind}Path") for part in ("", "._local") for kind in ("", "Posix", "Windows")),
    *((f"pathlib{part}", f"Pure{kind}Path") for part in ("", "._local") for kind in ("", "Posix", "Windows")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(("numpy.dtypes", f"{kind}{bits}DType") for kind in ("Int", "UInt", "Float") for bits in (8, 16, 32, 64)),
    *(("numpy.dtypes", f"{kind}DType") for kind in ("Bool", "Str", "Bytes", "Object", "Complex64", "Complex128")),
    *(("datetime", name) for name in ("datetime", "date", "time", "timedelta", "timezone")),
    ("uuid", "UUID"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("enum", "Enum"),
    ("typing", "Any"),
    *(("builtins", kind) for kind in ("list", "dict", "tuple", "int", "float", "str", "complex", "range", "slice")),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    *(
        ("omegaconf.nodes", f"{kind}Node")
        for kind in ("Any", "Integer", "Float", "String", "Boolean", "Path", "Bytes", "Enum")
    ),
)
#: The same for kinds of dict: their items are read as those of a plain one.
DICTS = (
    ("collections", "defaultdict"),
    ("yacs.config", "CfgNode"),
    ("fvcore.common.config", "CfgNode"),
    ("easydict", "EasyDict"),
    ("addict.addict", "Dict"),
    ("munch", "Munch"),
    *((f"{home}.utilities.parsing", "AttributeDict") for home in ("pytorch_lightning", "lightning.pytorch")),
    *((f"{home}.utilities.data", "AttributeDict") for home in ("lightning_fabric", "lightning.fabric")),
)


class _Inert:
    """Takes whatever a pickle gives to the class it stands for, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


def _named(base: type, module: str, name: str) -> type:
    return type(name, (base,), {"__module__": module})  # torch looks classes up by these two


_SAFE: list[Any] = [_named(_Inert, *name) for name in STAND_INS] + [_named(_InertDict, *name) for name in DICTS]


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The mapping that torch.save wrote; WeightsError when it would execute code or holds something else."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        with warnings.catch_warnings():  # about what is refused below anyway
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_SAFE):
                found = _load(path, zipped)
    except (pickle.UnpicklingError, RuntimeError, AttributeError, ValueError) as error:
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not (names or "TorchScript" in str(error) or _is_whole_pickle(path)):
            raise  # not a question of trust: broken
        raise WeightsError(_would_run_code(path, names)) from error
    if not isinstance(found, Mapping):
        raise WeightsError(f"vit: weights {str(path)!r} hold a {type(found).__name__}, not a state dict")
    return found


def _load(path: Path, zipped: bool) -> Any:
    """torch.load: where it can, tensors are pages of the file, so that what is not used, such as an optimizer's state,
    is not read and the rest is in memory once."""
    try:
        name = str(path)
        name.encode()
    except UnicodeEncodeError:  # a name that torch does not take
        zipped = False
    if zipped and not name.endswith(".safetensors"):  # of that name torch.load reads nothing else
        found = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        _check_storages(path)  # which torch.load does where it reads them, but not where it maps them
        return found
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


class _Noted(dict[Any, Any]):
    """Stands for every name of a pickle: takes whatever is given to it, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """As of a list."""

    extend = add = append


class _Storages(pickle.Unpickler):
    """Notes the records that a pickle of torch.save calls storages, and how many bytes each has by it."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.bytes: dict[str, set[int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        storage = getattr(torch, name, None) if module in ("torch", "torch.storage") and "Storage" in name else None
        itemsize = getattr(getattr(storage, "dtype", None), "itemsize", 1)  # UntypedStorage counts bytes
        return type(name, (_Noted,), {"itemsize": itemsize})

    def persistent_load(self, given: Any) -> Any:
        _, kind, key, _, count = given
        self.bytes.setdefault(str(key), set()).add(count * kind.itemsize)
        return _Noted()


def _check_storages(path: Path) -> None:
    """ValueError where a record has another size than the pickle says, and its tensors would hold other records."""
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename.partition("/")[2]: member.file_size for member in archive.infolist()}
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            found = _Storages(file)
            found.load()
    for key, said in found.bytes.items():
        size = sizes.get(f"data/{key}")
        if said != {size}:
            raise ValueError(f"record data/{key} has {size} bytes, and the pickle says {max(said)}")


def _would_run_code(path: Path, names: list[str]) -> str:
    called = f" ({printable(', '.join(dict.fromkeys(names)))})" if names else ""
    return (
        f"vit: weights {str(path)!r} hold more than tensors, and reading them would execute code the file "
        f"names{called}: refused. Whoever made the file can write its tensors alone, in the program that made it: "
        "for a model safetensors.torch.save_file(model.state_dict(), 'x.safetensors'), for a checkpoint dict "
        "safetensors.torch.save_file(checkpoint['model'], 'x.safetensors') with the key of its state dict"
    )


def _check_zip(path: Path) -> None:
    """torch.save stores members as they are: whatever is compressed or overlaps would unpack to more than the file."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    size = path.stat().st_size
    if any("/code/__torch__" in member.filename for member in members):
        raise WeightsError(
            f"vit: weights {str(path)!r} are a program of TorchScript (torch.jit.save), not tensors alone; whoever "
            "made it can write these: safetensors.torch.save_file(torch.jit.load(file).state_dict(), 'x.safetensors')"
        )
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > size:
        what = f"{some(packed, 3)} are compressed" if packed else f"its members say more than its {size} bytes"
        raise WeightsError(
            f"vit: weights {str(path)!r} were not written by torch.save: {printable(what)}; save them again"
        )


def _is_whole_pickle(path: Path) -> bool:
    """Whether the file is a plain pickle from its first to its last opcode; looks, executes nothing."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 1 and not file.read(1)
    except (ValueError, EOFError, IndexError, struct.error):
        return False
