"""Small images: generated fine-grained classes that need no download, and CIFAR-100/10 in their
binary versions.

    generated   superclasses of look-alike fine classes, 16x16x3 floats; another world for every
                seed
    cifar100    50,000 + 10,000 photographs, 32x32x3 bytes, 100 classes; downloaded and verified
    cifar10     the same with 10 classes
    a folder    yours: train.bin and test.bin in the binary format of CIFAR-100 (or the six files of
    CIFAR-10)

The binary format is read without pickle: a record is the label (CIFAR-100: a coarse byte, then the
fine one) and 3072 bytes of pixels: the red, green and blue planes, row by row. A whole set fits
into the memory of any GPU, so `augment` works there on a batch at a time; no worker process, no
queue.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import download
from data.reading import ReadError, read_bytes, reading


class ImageSet(NamedTuple):
    """Images [N, 3, height, width], uint8 or float32, and labels [N] int64. A model reads (x -
    offset) / scale.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    offset: Tensor  # [3, 1, 1]
    scale: Tensor  # [3, 1, 1]

    def to(self, device: str) -> "ImageSet":
        return ImageSet(*(item.to(device) if isinstance(item, Tensor) else item for item in self))

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 over all images and labels."""
        total = hashlib.sha256()
        for item in self:
            if isinstance(item, Tensor):
                total.update(item.cpu().contiguous().numpy().data)
        return total.hexdigest()[:12]

    def prepare(self, x: Tensor) -> Tensor:
        return (x.float() - self.offset) / self.scale


# --------------------------------------------------------------------------------------------------
# Generated fine-grained classes
# --------------------------------------------------------------------------------------------------


def fine_grained(
    seed: int,
    train_per_class: int = 80,
    val_per_class: int = 40,
    test_per_class: int = 100,
    num_superclasses: int = 10,
    num_fine: int = 5,
    size: int = 16,
) -> ImageSet:
    """num_superclasses * num_fine classes; those of one superclass share most of their picture.

    A class is a smooth random field, its superclass's plus half its own. An image is that field,
    shifted by up to two pixels (wrapping), mirrored or not, made lighter or darker, tinted, and
    covered with noise. Raises ValueError for a number below 1 (below 0 for val_per_class).
    """
    counts = {"train_per_class": train_per_class, "test_per_class": test_per_class}
    for name, count in {
        **counts,
        "num_superclasses": num_superclasses,
        "num_fine": num_fine,
        "size": size,
    }.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; at least 1 is needed")
    if val_per_class < 0:
        raise ValueError(f"val_per_class is {val_per_class}; 0 or more is needed")
    generator = torch.Generator().manual_seed(seed)

    def field(count: int, cells: int) -> Tensor:
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)

    num_classes = num_superclasses * num_fine
    prototypes = field(num_superclasses, 4).repeat_interleave(num_fine, dim=0) + 0.5 * field(
        num_classes, 6
    )
    prototypes = prototypes / prototypes.std(
        dim=(1, 2, 3), keepdim=True
    )  # [classes, 3, size, size]

    def sample(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(per_class * num_classes) % num_classes  # any stretch of it is balanced
        shift = torch.randint(-2, 3, (len(y), 2), generator=generator)
        mirrored = torch.rand(len(y), generator=generator) < 0.5
        contrast = torch.empty(len(y), 1, 1, 1).uniform_(0.6, 1.4, generator=generator)
        tint = 0.4 * torch.randn(len(y), 3, 1, 1, generator=generator)
        rows, columns = ((torch.arange(size) - shift[:, i, None]) % size for i in (0, 1))
        x = contrast * _pick(prototypes[y], rows, columns, mirrored) + tint
        return (x + torch.randn(x.shape, generator=generator)).contiguous(), y

    parts = [
        part for count in (train_per_class, val_per_class, test_per_class) for part in sample(count)
    ]
    return ImageSet(
        f"generated-{seed}", *parts, num_classes, torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    )


def _pick(x: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
    """x [N, C, ...], rows [N, height], columns [N, width], mirrored [N] bool -> [N, C, height,
    width], permuted.
    """
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(x: Tensor, shift: Tensor, mirrored: Tensor, padding: int = 4) -> Tensor:
    """Random crop of the zero-padded image, and mirroring: the standard augmentation of CIFAR, on
    x's own device.

    x [N, C, height, width], not yet normalised; shift [N, 2] int64 in 0 .. 2 * padding (padding:
    not moved); mirrored [N] bool -> the same shape and dtype.
    """
    height, width = x.shape[2:]
    rows = shift[:, :1] + torch.arange(height, device=x.device)  # [N, height]
    columns = shift[:, 1:] + torch.arange(width, device=x.device)
    return _pick(F.pad(x, (padding,) * 4), rows, columns, mirrored)


def batch_maker(
    data: ImageSet, batch_size: int, seed: int, augmented: bool
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """step -> (x [batch_size, 3, height, width] normalised, y, index of each image), a function of
    the step alone.

    The order, and with `augmented` the crops, are drawn an epoch at a time and cut out on the
    device of the data: images are shifted by up to an eighth of their height, as is usual for
    CIFAR. The last, smaller batch of an epoch is dropped.
    """
    count, padding, plan = len(data.train_y), data.train_x.shape[2] // 8, {}

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = divmod(step, count // batch_size)
        if epoch not in plan:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(count, generator=generator)
            shift = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
            mirrored = torch.rand(count, generator=generator) < 0.5
            plan.clear()
            plan[epoch] = [drawn.to(data.train_y.device) for drawn in (order, shift, mirrored)]
        index, shift, mirrored = (
            drawn[place * batch_size : (place + 1) * batch_size] for drawn in plan[epoch]
        )
        x = data.train_x[index]
        x = augment(x, shift, mirrored, padding) if augmented else x
        return data.prepare(x), data.train_y[index], index

    return batches


# --------------------------------------------------------------------------------------------------
# CIFAR
# --------------------------------------------------------------------------------------------------

PIXELS = 3 * 32 * 32
MEAN_STD = {  # of the training images, in 0 .. 1; the figures every CIFAR repository uses
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
FILES = {  # format: (label bytes a record, training files, test file)
    "cifar100": (2, ("train.bin",), "test.bin"),
    "cifar10": (1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
}
FOLDERS = {"cifar100": "cifar-100-binary", "cifar10": "cifar-10-batches-bin"}  # inside the archives


def read_records(path: str | Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """One file of the binary version: images [N, 3, 32, 32] uint8, labels [N] int64.

    label_bytes  2 for CIFAR-100, whose second byte is the fine label; 1 for CIFAR-10
    Raises ValueError when the file is empty or does not end with a whole record.
    """
    record = label_bytes + PIXELS
    with reading(path) as at:
        content = bytearray(read_bytes(path))
        whole = len(content) > 0 and len(content) % record == 0
        at.need(
            whole,
            f"{len(content):,} bytes are no whole number of {record}-byte records; truncated?",
        )
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].long()


def read_folder(folder: str | Path, train_per_class: int = 0, val_per_class: int = 0) -> ImageSet:
    """A folder in the binary format of CIFAR-100 or CIFAR-10, recognised by its file names.

    train_per_class  images of each class to train on, the first in the file; 0: all that are not
                     held out
    val_per_class    images of each class held out for validation, the last in the file
    Raises FileNotFoundError for a folder without the files, ValueError for a truncated file, labels
    that the training files do not have, or a class with too few images.
    """
    path = Path(folder).expanduser()
    kinds = [kind for kind, (_, _, test) in FILES.items() if (path / test).exists()]
    if not kinds:
        raise FileNotFoundError(
            f"{folder} holds neither train.bin, test.bin (CIFAR-100) nor test_batch.bin (CIFAR-10)"
        )
    if len(kinds) > 1:
        raise ReadError(f"{folder} holds both {' and '.join(kinds)}; keep the files of one of them")
    label_bytes, train_files, test_file = FILES[kinds[0]]
    parts = [read_records(path / name, label_bytes) for name in train_files]
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    test_x, test_y = read_records(path / test_file, label_bytes)
    num_classes = int(y.max()) + 1
    absent = (torch.bincount(y) == 0).nonzero().flatten().tolist()
    if absent:
        raise ReadError(
            f"{folder}: labels reach {num_classes - 1}, but no training image has {absent[0]}"
        )
    if int(test_y.max()) >= num_classes:
        raise ReadError(
            f"{path / test_file}: label {int(test_y.max())}; training knows {num_classes} classes"
        )
    train, val = _hold_out(y, num_classes, train_per_class, val_per_class)
    offset, scale = (255 * torch.tensor(figures).view(3, 1, 1) for figures in MEAN_STD[kinds[0]])
    name = path.resolve().name
    return ImageSet(
        name, x[train], y[train], x[val], y[val], test_x, test_y, num_classes, offset, scale
    )


def _hold_out(
    y: Tensor, num_classes: int, train_per_class: int, val_per_class: int
) -> tuple[Tensor, Tensor]:
    """Indices to train on and to validate on, each in the order of the file."""
    if min(train_per_class, val_per_class) < 0:
        raise ValueError(
            f"train_per_class is {train_per_class}, val_per_class {val_per_class}; below 0"
        )
    order, count = y.argsort(stable=True), torch.bincount(y, minlength=num_classes)
    place = torch.empty_like(y)  # how many of its class stand before an image
    place[order] = torch.arange(len(y)) - (count.cumsum(0) - count)[y[order]]
    needed = train_per_class + val_per_class + (train_per_class == 0 and val_per_class > 0)
    if needed > int(count.min()):
        asked = f"train_per_class is {train_per_class}, val_per_class {val_per_class}"
        raise ValueError(f"{asked}; the smallest class has {int(count.min())} images")
    held_out = place >= (count - val_per_class)[y]
    chosen = ~held_out & ((place < train_per_class) | (train_per_class == 0))
    return chosen.nonzero()[:, 0], held_out.nonzero()[:, 0]


def load(
    source: str, data_dir: str | Path, train_per_class: int = 0, val_per_class: int = 0
) -> ImageSet:
    """`cifar100` or `cifar10` (downloaded and verified below data_dir), or a folder in one of their
    binary formats.
    """
    if source not in FILES:
        return read_folder(source, train_per_class, val_per_class)
    folder = download.fetch(source, data_dir) / FOLDERS[source]
    return read_folder(folder, train_per_class, val_per_class)._replace(name=source)


def download_size(source: str, data_dir: str | Path) -> int | None:
    """Bytes that `load` would download."""
    there = source not in FILES or (Path(data_dir) / source / download.MARKER).exists()
    return 0 if there else download.DATASETS[source].size


def blank(source: str) -> ImageSet:
    """Black images in the number and shape of `cifar100` or `cifar10`, to reckon with before a
    download.
    """
    num_classes, one = int(source.removeprefix("cifar")), torch.ones(3, 1, 1)
    x, y = torch.zeros(60_000, 3, 32, 32, dtype=torch.uint8), torch.arange(60_000) % num_classes
    train, val, test = slice(0, 50_000), slice(0, 0), slice(50_000, 60_000)
    return ImageSet(
        source, x[train], y[train], x[val], y[val], x[test], y[test], num_classes, one, one
    )
