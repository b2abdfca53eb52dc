"""Small images: generated fine-grained classes that need no download, and CIFAR-100/10 in their
binary versions.

    generated   superclasses of look-alike classes, 16x16x3 floats; another world for every seed
    cifar100    50,000 + 10,000 photographs, 32x32x3 bytes, 100 classes; downloaded and verified
    cifar10     the same with 10 classes
    a folder    yours: train.bin and test.bin in the binary format of CIFAR-100, or the six files
                of CIFAR-10

The binary format is read without pickle: a record is the label (CIFAR-100: a coarse byte, then the
fine one) and 3072 bytes of pixels: the red, green and blue planes, row by row. A whole set fits
into the memory of any GPU, so `augment` works there on a batch at a time; no worker process, no
queue.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import download
from data.reading import read_bytes, reading


class ImageSet(NamedTuple):
    """Images [N, 3, height, width], uint8 or float32, and labels [N] int64.

    A model reads (x - offset) / scale.
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


SUPERCLASSES = 10
FINE = 5  # classes of a superclass
SIZE = 16  # pixels


def fine_grained(
    seed: int, train_per_class: int = 80, val_per_class: int = 40, test_per_class: int = 100
) -> ImageSet:
    """50 classes, 5 in each of 10 superclasses, whose members share most of their picture.

    A class is a smooth random field, its superclass's plus half its own. An image is that field,
    shifted by up to two pixels (wrapping), mirrored or not, made lighter or darker, tinted, and
    covered with noise. Raises ValueError for a number below 1 (below 0 for val_per_class).
    """
    if train_per_class < 1 or val_per_class < 0 or test_per_class < 1:
        asked = f"train_per_class is {train_per_class}, val_per_class is {val_per_class}"
        raise ValueError(f"{asked}, test_per_class is {test_per_class}; needed: at least 1, 0, 1")
    generator = torch.Generator().manual_seed(seed)

    def field(count: int, cells: int) -> Tensor:
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        return F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=False)

    num_classes = SUPERCLASSES * FINE
    shared = field(SUPERCLASSES, 4).repeat_interleave(FINE, dim=0)
    prototypes = shared + 0.5 * field(num_classes, 6)  # [classes, 3, SIZE, SIZE]
    prototypes = prototypes / prototypes.std(dim=(1, 2, 3), keepdim=True)

    def sample(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(per_class * num_classes) % num_classes  # any stretch of it is balanced
        shift = torch.randint(-2, 3, (len(y), 2), generator=generator)
        mirrored = torch.rand(len(y), generator=generator) < 0.5
        contrast = torch.empty(len(y), 1, 1, 1).uniform_(0.6, 1.4, generator=generator)
        tint = 0.4 * torch.randn(len(y), 3, 1, 1, generator=generator)
        rows = (torch.arange(SIZE) - shift[:, :1]) % SIZE
        columns = (torch.arange(SIZE) - shift[:, 1:]) % SIZE
        x = contrast * _pick(prototypes[y], rows, columns, mirrored) + tint
        return (x + torch.randn(x.shape, generator=generator)).contiguous(), y

    train = sample(train_per_class)
    val = sample(val_per_class)
    test = sample(test_per_class)
    offset = torch.zeros(3, 1, 1)
    scale = torch.ones(3, 1, 1)
    return ImageSet(f"generated-{seed}", *train, *val, *test, num_classes, offset, scale)


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
    count = len(data.train_y)
    padding = data.train_x.shape[2] // 8
    device = data.train_y.device

    @functools.lru_cache(maxsize=1)  # of the epoch at hand
    def draw(epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(count, generator=generator)
        shift = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        return order.to(device), shift.to(device), mirrored.to(device)

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = divmod(step, count // batch_size)
        order, shift, mirrored = draw(epoch)
        rows = slice(place * batch_size, (place + 1) * batch_size)
        index = order[rows]
        x = data.train_x[index]
        if augmented:
            x = augment(x, shift[rows], mirrored[rows], padding)
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
        size = len(content)
        whole = size > 0 and size % record == 0
        at.need(whole, f"{size:,} bytes are no whole number of {record}-byte records; truncated?")
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
    with reading(folder) as at:
        at.need(len(kinds) == 1, f"holds both {' and '.join(kinds)}; keep the files of one of them")
        kind = kinds[0]
        label_bytes, train_files, test_file = FILES[kind]
        parts = [read_records(path / name, label_bytes) for name in train_files]
        x = torch.cat([part[0] for part in parts])
        y = torch.cat([part[1] for part in parts])
        test_x, test_y = read_records(path / test_file, label_bytes)
        counts = torch.bincount(y)
        num_classes = len(counts)
        rarest = int(counts.argmin())
        gap = f"labels reach {num_classes - 1}, but no training image has {rarest}"
        at.need(int(counts[rarest]) > 0, gap)
        largest = int(test_y.max())
        unknown = f"{test_file} has label {largest}; training knows {num_classes} classes"
        at.need(largest < num_classes, unknown)
    train, val = _hold_out(y, counts, train_per_class, val_per_class)
    mean, std = MEAN_STD[kind]
    offset = 255 * torch.tensor(mean).view(3, 1, 1)
    scale = 255 * torch.tensor(std).view(3, 1, 1)
    return ImageSet(
        path.resolve().name,
        x[train], y[train], x[val], y[val], test_x, test_y,
        num_classes, offset, scale,
    )  # fmt: skip


def _hold_out(
    y: Tensor, counts: Tensor, train_per_class: int, val_per_class: int
) -> tuple[Tensor, Tensor]:
    """Indices to train on and to validate on, each in the order of the file. counts [classes]: of
    the labels y.
    """
    asked = f"train_per_class is {train_per_class}, val_per_class {val_per_class}"
    if min(train_per_class, val_per_class) < 0:
        raise ValueError(f"{asked}; below 0")
    smallest = int(counts.min())
    at_least = train_per_class or (1 if val_per_class else 0)  # something is left to train on
    if at_least + val_per_class > smallest:
        raise ValueError(f"{asked}; the smallest class has {smallest} images")
    train = []
    val = []
    for label, count in enumerate(counts.tolist()):
        members = (y == label).nonzero()[:, 0]
        first_held_out = count - val_per_class
        train.append(members[: train_per_class or first_held_out])
        val.append(members[first_held_out:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


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
    num_classes = int(source.removeprefix("cifar"))
    parts = []
    for count in (50_000, 0, 10_000):
        x = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        parts += [x, torch.arange(count) % num_classes]
    one = torch.ones(3, 1, 1)
    return ImageSet(source, *parts, num_classes, one, one)
