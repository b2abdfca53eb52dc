"""Logs of what people did with what they were shown: many binary tasks a row. And the ranking metrics for them.

    synthetic      generated in half a second; the true probability of every label is known
    kuairand-1k    11.7 million exposures of Kuaishou's feed; kuairand-pure: 1.4 million (Gao et al., CIKM 2022)
    census         Census-Income (KDD), the classic benchmark of MMoE: income and marital status

A row is an exposure: one id for each field (user, video, tab ...) and one 0/1 label for each task. Ids index embedding
tables, id 0 of a real field means missing or unknown. Real logs are split by date, never at random: rows of one
session in training and in test would tell on each other. KuaiRand's statistics file is not read at all, since it
averages the labels of the whole month, the test day included; nor is anything that happens after the exposure.
"""

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import download

DATASETS = ("synthetic", "kuairand-1k", "kuairand-pure", "census")
GROUPS = {
    "watch": ("effective_view", "long_view", "finish"),
    "inter": ("like", "profile", "comment", "forward", "follow"),
}


class Part(NamedTuple):
    ids: Tensor  # [rows, fields] int32
    labels: Tensor  # [rows, tasks] uint8, 0 or 1
    users: Tensor  # [rows] int32: whom GAUC groups by
    truth: Tensor | None = None  # [rows, tasks] fp32: true probabilities, where they are known
    dense: Tensor | None = None  # [rows, columns] fp32: raw numbers fed beside the embeddings

    def each(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """The same part with every tensor changed: moved, or some of its rows."""
        return Part(*(tensor if tensor is None else change(tensor) for tensor in self))


class Behavior(NamedTuple):
    name: str
    fields: dict[str, int]  # field -> rows of its embedding table
    groups: dict[str, tuple[str, ...]]  # group -> tasks; all tasks in this order are the columns of labels
    train: Part
    val: Part | None
    test: Part
    digest: str  # first 12 hex digits of a SHA-256 over ids and labels
    note: str = ""  # what a reader should know about these rows

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(itertools.chain(*self.groups.values()))


def check(data: Behavior) -> Behavior:
    """Raises ValueError naming the part, field or task: an id outside its table, a constant training label, no rows."""
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        if part is None:
            continue
        if not len(part.labels):
            raise ValueError(f"{data.name}: the {name} part has no rows")
        largest, smallest = part.ids.amax(dim=0).tolist(), part.ids.amin(dim=0).tolist()
        for (field, size), low, high in zip(data.fields.items(), smallest, largest):
            if low < 0 or high >= size:
                raise ValueError(f"{data.name}: {field} has ids {low} to {high}; its table has {size} rows")
    for task, rate in zip(data.tasks, data.train.labels.float().mean(dim=0).tolist()):
        if rate in (0.0, 1.0):
            raise ValueError(f"{data.name}: task {task!r} cannot be learnt, every training label is {rate:.0f}")
    return data


def batch_maker(part: Part, batch_size: int, seed: int) -> Callable[[int], Part]:
    """step -> a batch (ids, labels, dense) of `part`, on its device, a function of the step alone.

    The order is drawn anew for each epoch. The last, smaller batch of an epoch is dropped.
    """
    part, plan = part._replace(users=None, truth=None), {}

    def batches(step: int) -> Part:
        epoch, place = divmod(step, len(part.labels) // batch_size)
        if epoch not in plan:
            plan.clear()
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            plan[epoch] = torch.randperm(len(part.labels), generator=generator).to(part.labels.device)
        rows = plan[epoch][place * batch_size : (place + 1) * batch_size]
        return part.each(lambda tensor: tensor[rows])

    return batches


def as_labels(values: np.ndarray, tasks: Sequence[str], where: str, first_row: int = 0) -> np.ndarray:
    """[rows, tasks] numbers -> uint8. Raises ValueError naming the task and the first row that is not 0 or 1."""
    wrong = ~((values == 0) | (values == 1))  # true for NaN
    if wrong.any():
        row, task = np.argwhere(wrong)[0]
        value, row = values[row, task], first_row + row
        raise ValueError(f"{where}: label {tasks[task]!r} is {value} in row {row}; it must be 0 or 1")
    return values.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# Metrics: plain NumPy, one sort each
# ---------------------------------------------------------------------------------------------------------------


def _pairs(scores: object, truth: object, groups: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(won pairs, pairs, rows) of every group: a row is positive with weight p, negative with weight 1 - p."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    groups = np.asarray(groups)
    if not scores.shape == truth.shape == groups.shape or scores.ndim != 1:
        shapes = f"scores {scores.shape}, labels {truth.shape}, users {groups.shape}"
        raise ValueError(f"{shapes}; one column each is needed")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    if not ((truth >= 0) & (truth <= 1)).all():
        row = int(np.argmin((truth >= 0) & (truth <= 1)))
        raise ValueError(f"labels must lie in [0, 1]; row {row} holds {truth[row]}")
    if not len(scores):
        return np.zeros(1), np.zeros(1), np.zeros(1)
    order = np.lexsort((scores, groups))
    scores, truth, groups = scores[order], truth[order], groups[order]
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]  # rows of equal score share half their pairs
    starts, tie_starts = np.flatnonzero(new_group), np.flatnonzero(new_tie)
    positive, negative = np.add.reduceat(truth, tie_starts), np.add.reduceat(1 - truth, tie_starts)  # [ties]
    group_of_tie = np.cumsum(new_group)[tie_starts] - 1
    below = np.cumsum(negative) - negative  # negatives before a tie, in all groups
    first_tie = np.searchsorted(tie_starts, starts)
    below -= below[first_tie][group_of_tie]
    itself = np.add.reduceat(truth * (1 - truth), starts)  # the pair of a row with itself says nothing
    won = np.bincount(group_of_tie, positive * (below + negative / 2)) - itself / 2
    all_positive, all_negative = np.add.reduceat(truth, starts), np.add.reduceat(1 - truth, starts)
    pairs = all_positive * all_negative - itself
    return won, np.where(pairs > 1e-9 * all_positive * all_negative, pairs, 0.0), np.diff(np.r_[starts, len(scores)])


def expected_auc(scores: object, truth: object, users: object = None) -> float:
    """AUC when a row is positive with probability truth; with `users`, the GAUC of it. Columns [rows] -> a float.

    The expectation removes the noise of drawing labels, which drowns tasks of half a percent. With truth 0 or 1 it is
    the ordinary AUC, ties counting a half. A row is not paired with itself. NaN where no pair exists. GAUC is the mean
    over users that have a pair, weighted by their rows.
    Raises ValueError for NaN scores, truth outside [0, 1], or unequal lengths.
    """
    groups = np.zeros(len(np.asarray(scores)), dtype=np.int8) if users is None else users
    won, pairs, rows = _pairs(scores, truth, groups)
    has_pairs = pairs > 0
    if not has_pairs.any():
        return float("nan")
    return float(np.average(won[has_pairs] / pairs[has_pairs], weights=rows[has_pairs]))


def auc(scores: object, labels: object) -> float:
    """Area under the ROC curve of 0/1 labels; ties count a half; NaN with one class only."""
    return expected_auc(scores, labels)


def gauc(scores: object, labels: object, users: object) -> float:
    """Mean AUC within a user, weighted by the user's rows; users with one class only are left out."""
    return expected_auc(scores, labels, users)


def rare_and_frequent(data: Behavior) -> tuple[list[int], list[int]]:
    """The three tasks with the fewest positive training labels, and the three with the most (half, if under six)."""
    order, count = data.train.labels.float().mean(dim=0).argsort().tolist(), min(3, max(1, len(data.tasks) // 2))
    return sorted(order[:count]), sorted(order[-count:])


def ranking(scores: np.ndarray, part: Part, rare: list[int]) -> dict:
    """AUC and GAUC of every task, None where the labels are constant, and their means over the other tasks.

    A mean over no task is 0.5: such rows say nothing about any score.
    """
    truth = (part.labels if part.truth is None else part.truth).numpy()
    users, columns = part.users.numpy(), range(scores.shape[1])
    auc = np.array([expected_auc(scores[:, t], truth[:, t]) for t in columns])
    gauc = np.array([expected_auc(scores[:, t], truth[:, t], users) for t in columns])
    mean = lambda values: float(np.nanmean(values)) if not np.isnan(values).all() else 0.5
    plain = lambda values: [None if np.isnan(value) else value for value in values.tolist()]
    means = {"mean_auc": mean(auc), "mean_gauc": mean(gauc), "rare_gauc": mean(gauc[rare])}
    return {**means, "auc": plain(auc), "gauc": plain(gauc)}


# ---------------------------------------------------------------------------------------------------------------
# A generated log whose true probabilities are known
# ---------------------------------------------------------------------------------------------------------------

RATES = {
    "effective_view": 0.50, "long_view": 0.30, "finish": 0.20,
    "like": 0.06, "profile": 0.03, "comment": 0.012, "forward": 0.008, "follow": 0.005,
}  # fmt: skip


def synthetic(seed: int, rows: int = 120_000, users: int = 1000, items: int = 2000, heavy_tail: int = 0) -> Behavior:
    """Users and items with 8 hidden tastes; 3 frequent watch tasks, 5 rare interactions; the last fifth is the test.

    Every task mixes a taste of all tasks, one of its group and one of its own. The groups disagree about long videos:
    duration raises every watch task and lowers every interaction. heavy_tail adds that many log-normal noise columns.
    """
    if min(rows, users, items) < 1 or heavy_tail < 0:
        raise ValueError(f"rows is {rows}, users {users}, items {items}, heavy_tail {heavy_tail}; too few")
    rng, k = np.random.default_rng(seed), 8
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    taste, tags = normal(users, k), normal(30, k)
    author_tag, item_author = rng.integers(30, size=200), rng.integers(200, size=items)
    authors = 0.7 * tags[author_tag] + 0.7 * normal(200, k)
    content, tab_content = 0.8 * authors[item_author] + 0.6 * normal(items, k), normal(5, k)
    item_duration = rng.integers(10, size=items)
    popular = lambda count, power: np.arange(1, count + 1) ** -power / (np.arange(1, count + 1) ** -power).sum()
    user = rng.choice(users, rows, p=popular(users, 0.4))
    item = rng.choice(items, rows, p=popular(items, 0.5))
    tab = rng.integers(5, size=rows)
    p, q = taste[user], content[item] + 0.3 * tab_content[tab]  # [rows, k]
    duration = ((item_duration[item] - 4.5) / 3).astype(np.float32)
    standard = lambda z: (z - z.mean()) / z.std()

    def teacher() -> np.ndarray:
        bilinear = ((p @ normal(k, 3)) * (q @ normal(k, 3))).sum(axis=1) / (k * 3**0.5)
        z = bilinear + 0.5 * (p @ normal(k) + q @ normal(k)) / k**0.5
        return standard(np.tanh(z) + 0.5 * np.maximum(z, 0))

    everyone, truth = teacher(), []
    for sign, tasks in zip((1, -1), GROUPS.values()):
        group = standard(teacher() + 0.9 * sign * duration)
        for task in tasks:
            z = 2 * standard(0.2**0.5 * everyone + 0.6**0.5 * group + 0.2**0.5 * teacher())
            low, high = -20.0, 20.0  # bisection for the bias that gives the task its rate
            for _ in range(30):
                bias = (low + high) / 2
                low, high = (bias, high) if np.mean(1 / (1 + np.exp(-z - bias))) < RATES[task] else (low, bias)
            truth.append(1 / (1 + np.exp(-z - bias)))
    truth = np.stack(truth, axis=1).astype(np.float32)  # [rows, tasks]
    labels = (rng.random(truth.shape, dtype=np.float32) < truth).astype(np.uint8)
    sextiles = [np.searchsorted(np.quantile(column, np.arange(1, 6) / 6), column) for column in taste[:, :3].T]
    columns = {
        "user": (user, users),
        **{f"user_bucket{i}": (bucket[user], 6) for i, bucket in enumerate(sextiles)},
        "item": (item, items),
        "author": (item_author[item], 200),
        "tag": (author_tag[item_author[item]], 30),
        "duration": (item_duration[item], 10),
        "tab": (tab, 5),
    }
    ids = np.stack([column for column, _ in columns.values()], axis=1).astype(np.int32)
    dense = np.exp(1.2 * normal(rows, heavy_tail)) if heavy_tail else None
    digest = hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()[:12]
    arrays = [None if a is None else torch.from_numpy(a) for a in (ids, labels, user.astype(np.int32), truth, dense)]
    cut = rows - rows // 5
    train, test = Part(*arrays).each(lambda t: t[:cut]), Part(*arrays).each(lambda t: t[cut:])
    fields = {name: size for name, (_, size) in columns.items()}
    return check(Behavior("synthetic", fields, GROUPS, train, None, test, digest))


# ---------------------------------------------------------------------------------------------------------------
# KuaiRand
# ---------------------------------------------------------------------------------------------------------------

READER = 1  # raise it when the reader changes what it stores: older caches are then read anew
CHUNK = 200_000  # rows parsed at a time
ARRAYS = {"ids": np.int32, "labels": np.uint8, "users": np.int32}  # of each part, as stored
VAL_DATE, TEST_DATE = 20220507, 20220508  # validation, test; every earlier day is training
LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
LABELS = {  # task -> column of the log; finish is worked out
    "effective_view": "is_click", "long_view": "long_view", "like": "is_like", "profile": "is_profile_enter",
    "comment": "is_comment", "forward": "is_forward", "follow": "is_follow",
}  # fmt: skip
LOG_COLUMNS = ("user_id", "video_id", "date", "hourmin", "tab", "play_time_ms", "duration_ms", *LABELS.values())
USER_COLUMNS = (
    "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range", "fans_user_num_range",
    "friend_user_num_range", "register_days_range", *(f"onehot_feat{i}" for i in range(18)),
)  # fmt: skip
VIDEO_COLUMNS = ("video_type", "upload_type", "music_type", "tag")
PLAIN = {"duration": 26, "tab": 16, "hour": 24}  # fields that are numbers of the log: sizes of their tables
MISSING = ("", "-124", "nan", "NaN", "NULL")
NOTE = "most of KuaiRand comes from the single-column feed, where is_click is a valid play: it counts as a watch task"


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What is wrong inside a file becomes a ValueError that begins with its path."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and fetch it again") from error


def _positions(header: Sequence[str], wanted: Sequence[str], path: Path) -> list[int]:
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(header[:25])}")
    return [header.index(name) for name in wanted]


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[list[list[str]]]:
    """Chunks of the wanted cells; quotes and commas inside them are csv's business. Empty lines are passed over."""
    with _damage_named(path), open(path, newline="", encoding="utf-8-sig") as file:
        reader = filter(None, csv.reader(file))
        header = next(reader, [])
        positions = _positions(header, wanted, path)
        while chunk := list(itertools.islice(reader, CHUNK)):
            try:
                yield [[row[i] for i in positions] for row in chunk]
            except IndexError as error:
                row = next(row for row in chunk if len(row) <= max(positions))
                raise ValueError(f"{path}: {row[:5]} ... has {len(row)} cells, the header {len(header)}") from error


def _numbers(rows: Sequence[Sequence[str]], names: Sequence[str], path: Path) -> np.ndarray:
    """Cells -> [rows, columns] float64, NaN where a cell is empty."""
    try:
        return np.array([[float(cell) if cell else np.nan for cell in row] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path}: {error} among the columns {', '.join(names)}") from error


def _log_chunks(path: Path, bar: tqdm) -> Iterator[dict[str, np.ndarray]]:
    """The log in chunks of {column: [rows] float64}. Empty lines are passed over."""
    with _damage_named(path), open(path, newline="", encoding="utf-8-sig") as file:
        header = file.readline().strip().split(",")
        positions = _positions(header, LOG_COLUMNS, path)
        full_lines = (line for line in file if line.strip())
        while lines := list(itertools.islice(full_lines, CHUNK)):
            yield dict(zip(LOG_COLUMNS, _log_table(lines, header, positions, path).T))
            bar.update(sum(map(len, lines)))


def _log_table(lines: Sequence[str], header: Sequence[str], positions: Sequence[int], path: Path) -> np.ndarray:
    """Lines -> [rows, wanted columns] float64: by NumPy's own parser, or by csv where a cell is empty or quoted."""
    if all(line.count(",") == len(header) - 1 for line in lines):  # NumPy would not mind one cell too many
        with contextlib.suppress(ValueError):
            return np.loadtxt(lines, delimiter=",", usecols=positions, ndmin=2, comments=None)
    rows = list(csv.reader(lines))
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}: a row has {len(row)} cells, the header {len(header)}")
    return _numbers([[row[i] for i in positions] for row in rows], LOG_COLUMNS, path)


def _exact(cells: Sequence[str], vocabulary: dict[str, int]) -> np.ndarray:
    """Each value its own id from 1 on, in order of appearance; 0 for missing."""
    return np.array([0 if c in MISSING else vocabulary.setdefault(c, len(vocabulary) + 1) for c in cells], np.int32)


def _hash(values: np.ndarray, bits: int) -> np.ndarray:
    """Ids -> 1 .. 2^bits - 1 by multiplicative hashing, 0 for NaN: a table of fixed size, with some collisions."""
    known = ~np.isnan(values)
    mixed = np.where(known, values, 0).astype(np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.where(known, 1 + (mixed >> np.uint64(16)) % np.uint64(2**bits - 1), 0).astype(np.int32)


def _look_up(keys: np.ndarray, table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of table [keys, columns] for the wanted keys (keys sorted); zeros where a key is unknown."""
    position = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where((keys[position] == wanted)[:, None], table[position], 0)


def _user_table(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(user ids sorted, [users, 1 + columns] ids, {field: table size})."""
    rows = list(itertools.chain(*_rows(path, ("user_id", *USER_COLUMNS))))
    if not rows:
        raise ValueError(f"{path} holds no users")
    user_id = _numbers([row[:1] for row in rows], ("user_id",), path)[:, 0]
    vocabularies = [{} for _ in USER_COLUMNS]
    columns = [_exact(cells, words) for cells, words in zip(list(zip(*rows))[1:], vocabularies)]
    order = np.argsort(user_id)
    table = np.stack([np.arange(1, len(rows) + 1), *(column[order] for column in columns)], axis=1).astype(np.int32)
    sizes = {name: len(words) + 1 for name, words in zip(USER_COLUMNS, vocabularies)}
    return user_id[order], table, {"user_id": len(rows) + 1, **sizes}


def _video_table(path: Path, hash_bits: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(video ids sorted, [videos, 2 + columns] ids, {field: table size}); of several tags the first counts."""
    wanted, vocabularies = ("video_id", "author_id", "music_id", *VIDEO_COLUMNS), [{} for _ in VIDEO_COLUMNS]
    video_ids, tables = [], []
    for rows in tqdm(_rows(path, wanted), desc=path.name, unit_scale=CHUNK, unit=" rows", disable=None, leave=False):
        numbers = _numbers([["" if c in MISSING else c for c in row[:3]] for row in rows], wanted[:3], path)
        words = list(zip(*(row[3:] for row in rows)))
        words[-1] = [tags.split(",")[0].strip() for tags in words[-1]]
        hashed = [_hash(numbers[:, i], hash_bits - 2) for i in (1, 2)]
        video_ids.append(numbers[:, 0])
        tables.append(np.stack([*hashed, *(_exact(*pair) for pair in zip(words, vocabularies))], axis=1))
    if not video_ids:
        raise ValueError(f"{path} holds no videos")
    ids = np.concatenate(video_ids)
    order = np.argsort(ids)
    sizes = {name: len(words) + 1 for name, words in zip(VIDEO_COLUMNS, vocabularies)}
    sizes = {"author_id": 2 ** (hash_bits - 2), "music_id": 2 ** (hash_bits - 2), **sizes}
    return ids[order], np.concatenate(tables)[order], sizes


def _kuairand_paths(name: str, root: Path) -> list[Path]:
    """[early log, late log, users, videos]"""
    version = name.removeprefix("kuairand-")
    folder = f"KuaiRand-{version.upper() if version == '1k' else version.title()}/data"
    names = (*LOGS, "user_features", "video_features_basic")
    return [root / name / folder / f"{stem}_{version}.csv" for stem in names]


def kuairand(name: str, root: Path, hash_bits: int = 20) -> Behavior:
    """KuaiRand-1K or -Pure, the standard logs, split by date. Read once, then mapped from root/<name>/parsed.

    The video table has 2^hash_bits rows, those of authors and music a quarter of that; all other fields are exact.
    Raises ValueError naming file and column for what is missing or no number, DownloadError when it cannot be had.
    """
    if not 4 <= hash_bits <= 28:
        raise ValueError(f"hash_bits is {hash_bits}; 4 to 28 are allowed")
    paths = _kuairand_paths(name, root)
    if not is_here(name, root):  # files put there by hand are taken as they are; fetched ones are verified
        download.fetch(name, root)
    sources = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((READER, hash_bits, sources)).encode()).hexdigest()
    folder = root / name / "parsed"
    meta = _read_meta(folder, key)
    if not meta:
        with tempfile.TemporaryDirectory(prefix=".parsed-", dir=root / name) as temporary:
            meta = {"key": key, **_parse(paths, Path(temporary), hash_bits)}
            (Path(temporary) / "meta.json").write_text(json.dumps(meta))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    parts = []
    for part, rows in meta["rows"].items():
        if not rows:
            raise ValueError(
                f"{name}: the {part} part has no rows ({VAL_DATE} is validation, {TEST_DATE} the test day)"
            )
        mapped = [np.memmap(folder / f"{part}-{kind}", dtype, "c") for kind, dtype in ARRAYS.items()]
        ids, labels, users = (torch.from_numpy(array) for array in mapped)
        parts.append(Part(ids.view(rows, -1), labels.view(rows, -1), users))
    return check(Behavior(name, meta["fields"], GROUPS, *parts, meta["digest"], f"{NOTE}; {meta['note']}"))


def _read_meta(folder: Path, key: str) -> dict:
    """What `_parse` left, if it is of this key and whole; otherwise {}."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = {"ids": 4 * len(meta["fields"]), "labels": len(RATES), "users": 4}  # bytes a row
        sizes = [
            ((folder / f"{p}-{kind}").stat().st_size, n * size[kind]) for p, n in meta["rows"].items() for kind in size
        ]
        return meta if meta["key"] == key and all(found == wanted for found, wanted in sizes) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _parse(paths: Sequence[Path], out: Path, hash_bits: int) -> dict:
    """CSV -> raw arrays {train,val,test}-{ids,labels,users} in `out`; returns fields, rows and digest."""
    logs, (user_path, video_path) = paths[:2], paths[2:]
    users, user_table, user_sizes = _user_table(user_path)
    videos, video_table, video_sizes = _video_table(video_path, hash_bits)
    fields = {**user_sizes, "video_id": 2**hash_bits, **video_sizes, **PLAIN}
    tasks, rows, digest = list(RATES), dict.fromkeys(("train", "val", "test"), 0), hashlib.sha256()
    unknown = 0
    files = {(part, kind): open(out / f"{part}-{kind}", "wb") for part in rows for kind in ARRAYS}
    bar = tqdm(total=sum(path.stat().st_size for path in logs), unit="B", unit_scale=True, desc="logs", disable=None)
    try:
        chunks = ((path, *numbered) for path in logs for numbered in enumerate(_log_chunks(path, bar)))
        for path, i, log in chunks:
            play, duration = log["play_time_ms"], log["duration_ms"]
            with np.errstate(invalid="ignore"):
                finish = (play >= duration) & (duration > 0)  # false where one is missing
                bucket = np.where(duration > 0, 1 + np.log2(np.maximum(duration, 1)), 0)  # octaves of a millisecond
            unknown += int((~(duration > 0) | np.isnan(play)).sum())
            given = {**{task: log[column] for task, column in LABELS.items()}, "finish": finish}
            labels = as_labels(np.stack([given[task] for task in tasks], axis=1), tasks, str(path), i * CHUNK)
            for column in ("user_id", "video_id", "date", "tab", "hourmin"):
                if not np.isfinite(log[column]).all():
                    raise ValueError(f"{path}: column {column!r} has an empty cell, or one that is no finite number")
            plain = np.stack([bucket, log["tab"] + 1, log["hourmin"] // 100], axis=1)
            ids = [_look_up(users, user_table, log["user_id"]), _hash(log["video_id"], hash_bits)[:, None]]
            ids = np.concatenate([*ids, _look_up(videos, video_table, log["video_id"]), plain], axis=1).astype(np.int32)
            over = (ids < 0) | (ids >= np.array(list(fields.values())))
            if over.any():
                row, column = np.argwhere(over)[0]
                name = list(fields)[column]
                raise ValueError(f"{path}: {name} gives id {ids[row, column]}; its table has {fields[name]} rows")
            arrays = {"ids": ids, "labels": labels, "users": log["user_id"].astype(np.int32)}
            part_of = np.digitize(log["date"], [VAL_DATE, TEST_DATE, TEST_DATE + 1])
            for number, part in enumerate(rows):
                rows[part] += int((part_of == number).sum())
                for kind, array in arrays.items():
                    raw = array[part_of == number].tobytes()
                    files[part, kind].write(raw)
                    digest.update(raw)
    finally:
        bar.close()
        for file in files.values():
            file.close()
    note = f"{unknown:,} rows without duration or play time count as not finished"
    return {"fields": fields, "rows": rows, "digest": digest.hexdigest()[:12], "note": note}


# ---------------------------------------------------------------------------------------------------------------
# Census-Income
# ---------------------------------------------------------------------------------------------------------------

CENSUS_FILES = ("census-income.data", "census-income.test")
CENSUS_LIMIT = 1_000_000  # rows of a file; the larger one has 199,523
CENSUS_COLUMNS = (
    "age", "class_of_worker", "industry", "occupation", "education", "wage_per_hour", "enrolled", "marital_status",
    "major_industry", "major_occupation", "race", "hispanic_origin", "sex", "union_member", "unemployment_reason",
    "employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer", "previous_region",
    "previous_state", "household_detail", "household_summary", "instance_weight", "migration_msa", "migration_region",
    "migration_within_region", "same_house", "migration_sunbelt", "num_employed", "parents", "country_father",
    "country_mother", "country_self", "citizenship", "own_business", "veteran_form", "veteran_benefits",
    "weeks_worked", "year", "income",
)  # fmt: skip
MONEY = ("wage_per_hour", "capital_gains", "capital_losses", "dividends")
CENSUS_GROUPS = {"income": ("over_50k",), "marital": ("never_married",)}


def census(root: Path) -> Behavior:
    """Census-Income, 39 fields, two tasks: income over 50,000 and never married. Fetched unless it lies in root/census.

    Training is the published training file, its last tenth for validation; the test is the published test file. With
    only one of the two there, that one is split 80/10/10 and the note says so. Fields are exact, money in half octaves;
    the survey's instance weight is no field. The household columns all but state the marital status: the benchmark
    keeps them, so its AUC is near 0.99 for everybody. There are no users: every row has its own block, GAUC is AUC.
    Raises ValueError naming the file and the line, or the folder and the column.
    """
    folder = root / "census"
    found = [next((p for p in (folder / f"{n}.gz", folder / n) if p.is_file()), None) for n in CENSUS_FILES]
    if not any(found):
        found = [download.fetch("census", root) / f"{name}.gz" for name in CENSUS_FILES]
    columns, cuts = None, []
    for path in filter(None, found):
        part = _census_columns(path)
        columns = part if columns is None else [a + b for a, b in zip(columns, part)]
        cuts.append(len(columns[0]))
    rows, note = cuts[-1], ""
    test_from = cuts[0] if len(cuts) == 2 else rows - rows // 10
    val_from = test_from - test_from // 10 if len(cuts) == 2 else rows - 2 * (rows // 10)
    if len(cuts) == 1:
        name = next(filter(None, found)).name
        note = f"only {name} is in {folder}: split 80/10/10 by position, which is not the benchmark's split"
    named = dict(zip(CENSUS_COLUMNS, columns))
    income, married = (np.array(named.pop(name)) for name in ("income", "marital_status"))
    for value in set(income.tolist()) - {"- 50000", "50000+"}:
        raise ValueError(f"{folder}: column 'income' holds {value!r}; '- 50000.' or '50000+.' is expected")
    labels = np.stack([income == "50000+", married == "Never married"], axis=1).astype(np.uint8)
    del named["instance_weight"]
    fields, ids = {}, []
    for name, cells in named.items():
        if name in MONEY:
            amount = _numbers([[cell] for cell in cells], (name,), folder)[:, 0]
            cells = np.ceil(2 * np.log2(1 + np.maximum(amount, 0))).astype(int).astype(str).tolist()
        codes = _exact(cells, {})
        known = codes[:val_from].max()  # numbered in order of appearance: what training has not shown lies above
        ids.append(np.where(codes > known, 0, codes))
        fields[name] = int(known) + 1
    ids = np.stack(ids, axis=1)
    digest = hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()[:12]
    arrays = [torch.from_numpy(array) for array in (ids, labels, np.zeros(rows, np.int32))]
    bounds = [(0, val_from), (val_from, test_from), (test_from, rows)]
    parts = [Part(*arrays).each(lambda t, low=low, high=high: t[low:high]) for low, high in bounds]
    return check(Behavior("census", fields, CENSUS_GROUPS, *parts, digest, note))


def _census_columns(path: Path) -> list[list[str]]:
    rows, opener = [], (gzip.open if path.suffix == ".gz" else open)
    with _damage_named(path), opener(path, "rt", encoding="utf-8", newline="") as file:
        lines = iter(lambda: file.readline(10_000), "")  # a file may unpack to one endless line
        for number, row in enumerate(filter(None, csv.reader(lines, skipinitialspace=True)), 1):
            if len(row) != len(CENSUS_COLUMNS):
                raise ValueError(f"{path}, line {number}: {len(row)} columns, {len(CENSUS_COLUMNS)} are expected")
            if number > CENSUS_LIMIT:
                raise ValueError(f"{path} has more than {CENSUS_LIMIT:,} rows")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    *columns, income = map(list, zip(*rows))
    return [*columns, [value.removesuffix(".") for value in income]]


def load(name: str, root: Path, seed: int = 0, hash_bits: int = 20, **generator: int) -> Behavior:
    """One of DATASETS. `generator`: arguments of `synthetic`, which alone depends on the seed."""
    if name == "synthetic":
        return synthetic(seed, **generator)
    if name == "census":
        return census(root)
    if name in DATASETS:
        return kuairand(name, root, hash_bits)
    raise ValueError(f"data is {name!r}; allowed: {', '.join(DATASETS)}")


def is_here(name: str, root: Path) -> bool:
    """Whether `load` would need no download."""
    if name == "synthetic":
        return True
    if name == "census":
        return any((root / "census" / f"{stem}{end}").is_file() for stem in CENSUS_FILES for end in ("", ".gz"))
    return all(path.is_file() for path in _kuairand_paths(name, root))


def download_size(name: str, root: Path) -> int | None:
    """Bytes that `load` would download; None where the publisher's size is not in the table."""
    return 0 if is_here(name, root) else download.DATASETS[name].size


def nominal(name: str, hash_bits: int = 20) -> Behavior:
    """For --dry-run before a download: the published number of rows over tables of the right order of size."""
    sizes = {"kuairand-1k": (11_713_045, 1_000), "kuairand-pure": (1_436_609, 27_285), "census": (299_285, 0)}
    (rows, users), groups = sizes[name], CENSUS_GROUPS if name == "census" else GROUPS
    if name == "census":
        fields = dict.fromkeys(CENSUS_COLUMNS, 64)
        for column in ("income", "marital_status", "instance_weight"):
            del fields[column]
    else:
        fields = {"user_id": users + 1, **dict.fromkeys((*USER_COLUMNS, *VIDEO_COLUMNS), 64), "video_id": 2**hash_bits}
        fields |= dict.fromkeys(("author_id", "music_id"), 2 ** (hash_bits - 2)) | PLAIN
    nothing = torch.zeros(1, dtype=torch.int32)  # expanded: no memory
    labels = nothing.to(torch.uint8).expand(rows, len(list(itertools.chain(*groups.values()))))
    part = Part(nothing.expand(rows, len(fields)), labels, nothing.expand(rows))
    note = f"{name} is not here yet: its size is the published one, the smaller tables have 64 rows"
    return Behavior(name, fields, groups, part, part, part, "", note)
