"""Logs of what people did with what they were shown: many binary tasks a row. And the ranking
metrics for them.

    synthetic      generated in half a second; the true probability of every label is known
    kuairand-1k    11.7 million exposures of Kuaishou's feed; kuairand-pure: 1.4 million (Gao et
                   al., CIKM 2022)
    census         Census-Income (KDD), the classic benchmark of MMoE: income and marital status

A row is an exposure: one id for each field (user, video, tab ...) and one 0/1 label for each task.
Ids index embedding tables, id 0 of a real field means missing or unknown. Real logs are split by
date, never at random: rows of one session in training and in test would tell on each other.
KuaiRand's statistics file is not read at all, since it averages the labels of the whole month, the
test day included; nor is anything that happens after the exposure.
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import download
from data.reading import Place, cached, lines, reading, table

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

    def each(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """The same part with every tensor changed: moved, or some of its rows."""
        return Part(*(tensor if tensor is None else change(tensor) for tensor in self))

    def cut(self, first: int, end: int) -> "Part":
        return self.each(lambda tensor: tensor[first:end])


class Behavior(NamedTuple):
    name: str
    fields: dict[str, int]  # field -> rows of its embedding table
    groups: dict[str, tuple[str, ...]]  # group -> tasks; all of them are the columns of labels
    train: Part
    val: Part | None
    test: Part
    digest: str  # first 12 hex digits of a SHA-256 over ids and labels
    note: str = ""  # what a reader should know about these rows

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(itertools.chain(*self.groups.values()))


def check(data: Behavior) -> Behavior:
    """Raises ValueError naming the part, field or task: an id outside its table, a constant
    training label, no rows.
    """
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        if part is None:
            continue
        if not len(part.labels):
            raise ValueError(f"{data.name}: the {name} part has no rows")
        smallest = part.ids.amin(dim=0).tolist()
        largest = part.ids.amax(dim=0).tolist()
        for (field, size), low, high in zip(data.fields.items(), smallest, largest, strict=True):
            if low < 0 or high >= size:
                raise ValueError(
                    f"{data.name}: {field} has ids {low} to {high}; its table has {size} rows"
                )
    for task, rate in zip(data.tasks, data.train.labels.float().mean(dim=0).tolist()):
        if rate in (0.0, 1.0):
            raise ValueError(
                f"{data.name}: task {task!r} cannot be learnt, every training label is {rate:.0f}"
            )
    return data


def batch_maker(part: Part, batch_size: int, seed: int) -> Callable[[int], Part]:
    """step -> a batch (ids, labels) of `part`, on its device, a function of the step alone.

    The order is drawn anew for each epoch. The last, smaller batch of an epoch is dropped.
    """
    part = part._replace(users=None, truth=None)
    count = len(part.labels)

    @functools.lru_cache(maxsize=1)  # of the epoch at hand
    def order(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(count, generator=generator).to(part.labels.device)

    def batches(step: int) -> Part:
        epoch, place = divmod(step, count // batch_size)
        rows = order(epoch)[place * batch_size : (place + 1) * batch_size]
        return part.each(lambda tensor: tensor[rows])

    return batches


# --------------------------------------------------------------------------------------------------
# Metrics: plain NumPy, one sort each
# --------------------------------------------------------------------------------------------------


def _pairs(
    scores: np.ndarray, truth: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(won pairs, pairs, rows) of every group: a row is positive with weight p, negative with
    weight 1 - p.
    """
    order = np.lexsort((scores, groups))
    scores = scores[order]
    truth = truth[order]
    groups = groups[order]
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    starts = np.flatnonzero(new_group)
    tie_starts = np.flatnonzero(new_tie)  # rows of equal score share half their pairs
    positive = np.add.reduceat(truth, tie_starts)  # [ties]
    negative = np.add.reduceat(1 - truth, tie_starts)
    group_of_tie = np.cumsum(new_group)[tie_starts] - 1
    below = np.cumsum(negative) - negative  # negatives before a tie, in all groups
    first_tie = np.searchsorted(tie_starts, starts)
    below -= below[first_tie][group_of_tie]
    # The pair of a row with itself says nothing.
    itself = np.add.reduceat(truth * (1 - truth), starts)
    won = np.bincount(group_of_tie, positive * (below + negative / 2)) - itself / 2
    crossed = np.add.reduceat(truth, starts) * np.add.reduceat(1 - truth, starts)
    pairs = crossed - itself
    rows = np.diff(np.r_[starts, len(scores)])
    return won, np.where(pairs > 1e-9 * crossed, pairs, 0.0), rows


def expected_auc(scores: object, truth: object, users: object = None) -> float:
    """AUC when a row is positive with probability truth; with `users`, the GAUC of it.

    Columns [rows] -> a float.

    The expectation removes the noise of drawing labels, which drowns tasks of half a percent. With
    truth 0 or 1 it is the ordinary AUC, ties counting a half. A row is not paired with itself. NaN
    where no pair exists. GAUC is the mean over users that have a pair, weighted by their rows.
    Raises ValueError for NaN scores, truth outside [0, 1], or unequal lengths.
    """
    scores = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(truth, dtype=np.float64)
    groups = np.zeros(len(scores), dtype=np.int8) if users is None else np.asarray(users)
    if not scores.shape == truth.shape == groups.shape or scores.ndim != 1:
        shapes = f"scores {scores.shape}, labels {truth.shape}, users {groups.shape}"
        raise ValueError(f"{shapes}; one column each is needed")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    inside = (truth >= 0) & (truth <= 1)
    if not inside.all():
        row = int(np.argmin(inside))
        raise ValueError(f"labels must lie in [0, 1]; row {row} holds {truth[row]}")
    if not len(scores):
        return math.nan
    won, pairs, rows = _pairs(scores, truth, groups)
    has_pairs = pairs > 0
    if not has_pairs.any():
        return math.nan
    return float(np.average(won[has_pairs] / pairs[has_pairs], weights=rows[has_pairs]))


def rare_and_frequent(data: Behavior) -> tuple[list[int], list[int]]:
    """The three tasks with the fewest positive training labels, and the three with the most (half,
    if under six).
    """
    order = data.train.labels.float().mean(dim=0).argsort().tolist()
    count = min(3, max(1, len(data.tasks) // 2))
    return sorted(order[:count]), sorted(order[-count:])


def ranking(scores: np.ndarray, part: Part, rare: list[int]) -> dict:
    """AUC and GAUC of every task, None where the labels are constant, and their means over the
    other tasks.

    A mean over no task is 0.5: such rows say nothing about any score.
    """
    truth = (part.labels if part.truth is None else part.truth).numpy()
    users = part.users.numpy()
    tasks = range(scores.shape[1])
    auc = [expected_auc(scores[:, task], truth[:, task]) for task in tasks]
    gauc = [expected_auc(scores[:, task], truth[:, task], users) for task in tasks]
    return {
        "mean_auc": _mean(auc),
        "mean_gauc": _mean(gauc),
        "rare_gauc": _mean([gauc[task] for task in rare]),
        "auc": _without_nan(auc),
        "gauc": _without_nan(gauc),
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else 0.5


def _without_nan(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


# --------------------------------------------------------------------------------------------------
# A generated log whose true probabilities are known
# --------------------------------------------------------------------------------------------------

RATES = {
    "effective_view": 0.50, "long_view": 0.30, "finish": 0.20,
    "like": 0.06, "profile": 0.03, "comment": 0.012, "forward": 0.008, "follow": 0.005,
}  # fmt: skip
TASTES = 8  # hidden numbers that describe a user, and a video


def synthetic(seed: int, rows: int = 120_000, users: int = 1000, items: int = 2000) -> Behavior:
    """Users and items with 8 hidden tastes; 3 frequent watch tasks, 5 rare interactions; the last
    fifth is the test.

    Every task mixes a taste of all tasks, one of its group and one of its own. The groups disagree
    about long videos: duration raises every watch task and lowers every interaction.
    """
    if min(rows, users, items) < 1:
        raise ValueError(f"rows is {rows}, users {users}, items {items}; at least 1 is needed")
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    taste = normal(users, TASTES)
    tags = normal(30, TASTES)
    author_tag = rng.integers(30, size=200)
    item_author = rng.integers(200, size=items)
    authors = 0.7 * tags[author_tag] + 0.7 * normal(200, TASTES)
    content = 0.8 * authors[item_author] + 0.6 * normal(items, TASTES)
    tab_content = normal(5, TASTES)
    item_duration = rng.integers(10, size=items)
    user = rng.choice(users, rows, p=_popularity(users, 0.4))
    item = rng.choice(items, rows, p=_popularity(items, 0.5))
    tab = rng.integers(5, size=rows)
    seen_by = taste[user]  # [rows, tastes]
    shown = content[item] + 0.3 * tab_content[tab]  # [rows, tastes]
    duration = ((item_duration[item] - 4.5) / 3).astype(np.float32)

    def teacher() -> np.ndarray:
        """What a user of these tastes feels about such a video, [rows]."""
        product = (seen_by @ normal(TASTES, 3)) * (shown @ normal(TASTES, 3))
        z = product.sum(axis=1) / (TASTES * 3**0.5)
        direction = normal(TASTES)
        z = z + 0.5 * (seen_by @ direction + shown @ normal(TASTES)) / TASTES**0.5
        return _standard(np.tanh(z) + 0.5 * np.maximum(z, 0))

    everyone = teacher()
    truth = []
    for sign, tasks in zip((1, -1), GROUPS.values()):
        group = _standard(teacher() + 0.9 * sign * duration)
        for task in tasks:
            z = 2 * _standard(0.2**0.5 * everyone + 0.6**0.5 * group + 0.2**0.5 * teacher())
            truth.append(_with_rate(z, RATES[task]))
    truth = np.stack(truth, axis=1).astype(np.float32)  # [rows, tasks]
    labels = (rng.random(truth.shape, dtype=np.float32) < truth).astype(np.uint8)

    author = item_author[item]
    columns = {
        "user": (user, users),
        "user_bucket0": (_sextiles(taste[:, 0])[user], 6),
        "user_bucket1": (_sextiles(taste[:, 1])[user], 6),
        "user_bucket2": (_sextiles(taste[:, 2])[user], 6),
        "item": (item, items),
        "author": (author, 200),
        "tag": (author_tag[author], 30),
        "duration": (item_duration[item], 10),
        "tab": (tab, 5),
    }
    fields = {name: size for name, (_, size) in columns.items()}
    ids = np.stack([column for column, _ in columns.values()], axis=1).astype(np.int32)
    whole = Part(*map(torch.from_numpy, (ids, labels, user.astype(np.int32), truth)))
    cut = rows - rows // 5
    train = whole.cut(0, cut)
    test = whole.cut(cut, rows)
    return check(Behavior("synthetic", fields, GROUPS, train, None, test, _digest(ids, labels)))


def _digest(ids: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()[:12]


def _sextiles(values: np.ndarray) -> np.ndarray:
    """0 .. 5: the sixth of all values that each belongs to."""
    return np.searchsorted(np.quantile(values, np.arange(1, 6) / 6), values)


def _popularity(count: int, power: float) -> np.ndarray:
    weights = np.arange(1, count + 1) ** -power
    return weights / weights.sum()


def _standard(z: np.ndarray) -> np.ndarray:
    return (z - z.mean()) / z.std()


def _with_rate(z: np.ndarray, rate: float) -> np.ndarray:
    """sigmoid(z + bias) with the bias, found by bisection, that makes its mean the rate."""
    low, high = -20.0, 20.0
    for _ in range(30):
        bias = (low + high) / 2
        if np.mean(1 / (1 + np.exp(-z - bias))) < rate:
            low = bias
        else:
            high = bias
    return 1 / (1 + np.exp(-z - bias))


# --------------------------------------------------------------------------------------------------
# KuaiRand
# --------------------------------------------------------------------------------------------------

CHUNK = 200_000  # rows parsed at a time
FIRST_DATE = 20220408
VAL_DATE = 20220507  # every day before it is training
TEST_DATE = 20220508
LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
LABELS = {  # task -> column of the log; finish is worked out
    "effective_view": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "profile": "is_profile_enter",
    "comment": "is_comment",
    "forward": "is_forward",
    "follow": "is_follow",
}
LOG_COLUMNS = {  # smallest and largest number; a duration below 1 is not known
    "user_id": (0, 2**31 - 1),
    "video_id": (0, 2**53 - 1),
    "date": (FIRST_DATE, TEST_DATE),
    "hourmin": (0, 2359),
    "tab": (0, 14),
    "play_time_ms": (-(2**53), 2**53),
    "duration_ms": (-(2**25), 2**25 - 1),
    **dict.fromkeys(LABELS.values(), (0, 1)),
}
MAY_BE_EMPTY = ("play_time_ms", "duration_ms")
LOG_SPARE = "time_ms is_hate profile_stay_time comment_stay_time is_rand".split()
USER_COLUMNS = """
    user_active_degree is_live_streamer is_video_author follow_user_num_range fans_user_num_range
    friend_user_num_range register_days_range
""".split()
USER_COLUMNS += [f"onehot_feat{i}" for i in range(18)]
USER_SPARE = """
    is_lowactive_period follow_user_num fans_user_num friend_user_num register_days
""".split()
VIDEO_HASHED = "author_id music_id".split()
VIDEO_COLUMNS = "video_type upload_type music_type tag".split()
VIDEO_SPARE = "upload_dt visible_status video_duration server_width server_height".split()
PLAIN = {"duration": 26, "tab": 16, "hour": 24}  # numbers of the log: sizes of their tables
MISSING = ("", "-124", "nan", "NaN", "NULL")
ARRAYS = {"ids": np.int32, "labels": np.uint8, "users": np.int32}  # of each part, as kept
NOTE = (
    "most of KuaiRand comes from the single-column feed, where is_click is a valid play: "
    "it counts as a watch task"
)


def _number_word(word: str, vocabulary: dict[str, int]) -> int:
    """Each word its own id from 1 on, in order of appearance; 0 for missing."""
    return 0 if word in MISSING else vocabulary.setdefault(word, len(vocabulary) + 1)


def _hash(values: np.ndarray, bits: int) -> np.ndarray:
    """Ids -> 1 .. 2^bits - 1 by multiplicative hashing, 0 for NaN: a table of fixed size, with some
    collisions.
    """
    known = ~np.isnan(values)
    whole = np.where(known, values, 0).astype(np.int64).astype(np.uint64)
    mixed = whole * np.uint64(0x9E3779B97F4A7C15)
    hashed = 1 + (mixed >> np.uint64(16)) % np.uint64(2**bits - 1)
    return np.where(known, hashed, 0).astype(np.int32)


def _whole(at: Place, text: str, what: str) -> float:
    """A whole number; no id beyond 2^53 is exact in float64."""
    value = at.number(text, what)
    is_id = 0 <= value < 2**53 and value == int(value)
    at.need(is_id, f"{what} {text} is no whole number from 0 to {2**53 - 1:,}")
    return value


class Entities(NamedTuple):
    """Users or videos: what the ids of a log stand for."""

    keys: np.ndarray  # [entities] sorted
    table: np.ndarray  # [1 + entities, fields] int32; row 0 is all zeros
    sizes: dict[str, int]  # field -> rows of its embedding table

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Rows of the table, [wanted]; 0 where a key is unknown."""
        position = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[position] == wanted, position + 1, 0)


def _read_entities(
    path: Path, key: str, hashed: Sequence[str], worded: Sequence[str], spare: Sequence[str],
    hash_bits: int,
) -> Entities:  # fmt: skip
    """One row for each value of the column `key`: some columns hashed, the words of others
    numbered; of several tags the first counts.
    """
    keys = []
    numbers = []
    words = []
    vocabularies = {name: {} for name in worded}
    with reading(path) as at:
        for entity, *cells in table(at, (key, *hashed, *worded), spare):
            keys.append(_whole(at, entity, key))
            ids = cells[: len(hashed)]
            numbers.append([np.nan if id in MISSING else _whole(at, id, "an id") for id in ids])
            row = dict(zip(worded, cells[len(hashed) :]))
            if "tag" in row:
                row["tag"] = row["tag"].split(",")[0].strip()
            words.append([_number_word(word, vocabularies[name]) for name, word in row.items()])
        at.need(len(keys) > 0, "holds no rows")
        at.line = 0
        order = np.argsort(keys)
        keys = np.array(keys)[order]
        twice = keys[1:][keys[1:] == keys[:-1]]
        if len(twice):
            at.refuse(f"id {twice[0]:.0f} is there twice")
    columns = [_hash(column, hash_bits) for column in np.array(numbers).T]
    rows = np.column_stack([*columns, np.array(words)])[order].astype(np.int32)
    sizes = dict.fromkeys(hashed, 2**hash_bits)
    for name, vocabulary in vocabularies.items():
        sizes[name] = len(vocabulary) + 1
    return Entities(keys, np.pad(rows, ((1, 0), (0, 0))), sizes)


def _read_log(path: Path, bar: tqdm) -> Iterator[dict[str, np.ndarray]]:
    """The log in chunks of {column: [rows] float64}, NaN where a cell is empty."""
    with reading(path) as at:
        rows = table(at, tuple(LOG_COLUMNS), LOG_SPARE)
        while chunk := list(itertools.islice(rows, CHUNK)):
            last_line = at.line
            first_line = last_line + 1 - len(chunk)
            log = {}
            for column, cells in zip(LOG_COLUMNS, zip(*chunk)):
                log[column] = _log_column(at, column, cells, first_line)
            yield log
            at.line = last_line
            bar.update(len(chunk))


def _log_column(at: Place, column: str, cells: Sequence[str], first_line: int) -> np.ndarray:
    try:
        if "_" in "".join(cells):  # Python reads 1_0 as ten
            raise ValueError
        values = np.array([float(cell or "nan") for cell in cells])
    except ValueError:  # find the place
        for at.line, cell in enumerate(cells, first_line):
            at.number(cell or "0", column)
        raise
    low, high = LOG_COLUMNS[column]
    good = (values >= low) & (values <= high)  # false for NaN
    if column in MAY_BE_EMPTY:
        good |= np.isnan(values)
    else:
        good &= values == np.floor(values)
    if not good.all():
        row = int(good.argmin())
        at.line = first_line + row
        value = f"{values[row]:.10g}"
        at.refuse(f"{column} is {value}; a whole number from {low} to {high} is needed")
    return values


def _kuairand_paths(name: str, root: Path) -> list[Path]:
    """[early log, late log, users, videos]"""
    version = name.removeprefix("kuairand-")
    folder = "KuaiRand-1K" if version == "1k" else "KuaiRand-Pure"
    names = (*LOGS, "user_features", "video_features_basic")
    return [root / name / folder / "data" / f"{stem}_{version}.csv" for stem in names]


def kuairand(name: str, root: Path, hash_bits: int = 20) -> Behavior:
    """KuaiRand-1K or -Pure, the standard logs, split by date.

    Read once, then mapped from root/<name>/parsed.

    The video table has 2^hash_bits rows, those of authors and music a quarter of that; all other
    fields are exact. Raises ValueError naming file, line and column for what is missing or no
    number, DownloadError when it cannot be had.
    """
    if not 4 <= hash_bits <= 28:
        raise ValueError(f"hash_bits is {hash_bits}; 4 to 28 are allowed")
    paths = _kuairand_paths(name, root)
    # Files put there by hand are taken as they are; fetched ones are verified.
    if not is_here(name, root):
        download.fetch(name, root)
    parse = functools.partial(_parse, paths, hash_bits)
    with cached(root / name / "parsed", paths, f"kuairand {hash_bits}", parse) as (folder, info):
        parts = []
        for part, rows in info["rows"].items():
            if not rows:
                dates = f"{VAL_DATE} is validation, {TEST_DATE} the test day"
                raise ValueError(f"{name}: the {part} part has no rows ({dates})")
            tensors = []
            for kind, dtype in ARRAYS.items():
                mapped = np.memmap(folder / f"{part}-{kind}", dtype, "c")
                tensors.append(torch.from_numpy(mapped))
            ids, labels, users = tensors
            parts.append(Part(ids.view(rows, -1), labels.view(rows, -1), users))
    note = f"{NOTE}; {info['note']}"
    return check(Behavior(name, info["fields"], GROUPS, *parts, info["digest"], note))


def _parse(paths: Sequence[Path], hash_bits: int, out: Path) -> dict:
    """CSV -> raw arrays {train,val,test}-{ids,labels,users} in `out`; returns fields, rows and
    digest.
    """
    *logs, users_path, videos_path = paths
    users = _read_entities(users_path, "user_id", (), USER_COLUMNS, USER_SPARE, hash_bits)
    videos = _read_entities(
        videos_path, "video_id", VIDEO_HASHED, VIDEO_COLUMNS, VIDEO_SPARE, hash_bits - 2
    )
    fields = {"user_id": len(users.table), **users.sizes}
    fields |= {"video_id": 2**hash_bits, **videos.sizes, **PLAIN}
    rows = {"train": 0, "val": 0, "test": 0}
    digest = hashlib.sha256()
    unknown = 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit=" rows", unit_scale=True, desc="logs", disable=None))
        names = [f"{part}-{kind}" for part in rows for kind in ARRAYS]
        files = {name: stack.enter_context(open(out / name, "wb")) for name in names}
        for log in itertools.chain(*(_read_log(path, bar) for path in logs)):
            play = log["play_time_ms"]
            duration = log["duration_ms"]
            has_duration = duration > 0  # false where it is missing
            unknown += int((~has_duration | np.isnan(play)).sum())
            finish = (play >= duration) & has_duration
            octave = np.where(has_duration, 1 + np.log2(np.maximum(duration, 1)), 0)
            user = users.find(log["user_id"])
            video = videos.find(log["video_id"])
            ids = [user, users.table[user], _hash(log["video_id"], hash_bits), videos.table[video]]
            ids += [octave, log["tab"] + 1, log["hourmin"] // 100]
            labels = [log[LABELS[task]] if task in LABELS else finish for task in RATES]
            arrays = {"ids": np.column_stack(ids), "labels": np.column_stack(labels)}
            arrays["users"] = log["user_id"]
            part_of = np.digitize(log["date"], [VAL_DATE, TEST_DATE])
            for number, part in enumerate(rows):
                chosen = part_of == number
                rows[part] += int(chosen.sum())
                for kind, dtype in ARRAYS.items():
                    raw = arrays[kind][chosen].astype(dtype).tobytes()
                    files[f"{part}-{kind}"].write(raw)
                    digest.update(raw)
    note = f"{unknown:,} rows without duration or play time count as not finished"
    return {"fields": fields, "rows": rows, "digest": digest.hexdigest()[:12], "note": note}


# --------------------------------------------------------------------------------------------------
# Census-Income
# --------------------------------------------------------------------------------------------------

CENSUS_FILES = ("census-income.data", "census-income.test")
CENSUS_LIMIT = 1_000_000  # rows of a file; the larger one has 199,523
CENSUS_COLUMNS = """
    age class_of_worker industry occupation education wage_per_hour enrolled marital_status
    major_industry major_occupation race hispanic_origin sex union_member unemployment_reason
    employment_status capital_gains capital_losses dividends tax_filer previous_region
    previous_state household_detail household_summary instance_weight migration_msa
    migration_region migration_within_region same_house migration_sunbelt num_employed parents
    country_father country_mother country_self citizenship own_business veteran_form
    veteran_benefits weeks_worked year income
""".split()
NOT_FIELDS = ("income", "marital_status", "instance_weight")
CENSUS_FIELDS = [name for name in CENSUS_COLUMNS if name not in NOT_FIELDS]
MONEY = ("wage_per_hour", "capital_gains", "capital_losses", "dividends")
INCOMES = ("- 50000.", "50000+.")
MARITAL = (
    "Never married", "Married-civilian spouse present", "Divorced", "Widowed", "Separated",
    "Married-spouse absent", "Married-A F spouse present",
)  # fmt: skip
CENSUS_GROUPS = {"income": ("over_50k",), "marital": ("never_married",)}


def census(root: Path) -> Behavior:
    """Census-Income, 39 fields, two tasks: income over 50,000 and never married.

    Fetched unless it lies in root/census.

    Training is the published training file, its last tenth for validation; the test is the
    published test file. With only one of the two there, that one is split 80/10/10 and the note
    says so. Fields are exact, money in half octaves; the survey's instance weight is no field. The
    household columns all but state the marital status: the benchmark keeps them, so its AUC is near
    0.99 for everybody. There are no users: every row has its own block, GAUC is AUC. Raises
    ValueError naming file, line and column.
    """
    paths = _census_paths(root)
    if not paths:
        download.fetch("census", root)
        paths = _census_paths(root)
    files = [_read_census(path) for path in paths]
    rows = sum(len(file) for file in files)
    note = ""
    if len(files) == 2:
        test_from = len(files[0])
        val_from = test_from - test_from // 10
    else:
        test_from = rows - rows // 10
        val_from = test_from - rows // 10
        how = "split 80/10/10 by position, which is not the benchmark's split"
        note = f"only {paths[0].name} is in {paths[0].parent}: {how}"
    columns = dict(zip(CENSUS_COLUMNS, zip(*itertools.chain(*files))))
    over_50k = np.array(columns["income"]) == INCOMES[1]
    never_married = np.array(columns["marital_status"]) == MARITAL[0]
    labels = np.stack([over_50k, never_married], axis=1).astype(np.uint8)
    fields = {}
    ids = []
    for name in CENSUS_FIELDS:
        vocabulary = {}
        codes = np.array([_number_word(word, vocabulary) for word in columns[name]], np.int32)
        # Numbered in order of appearance: what training has not shown lies above.
        known = codes[:val_from].max()
        ids.append(np.where(codes > known, 0, codes))
        fields[name] = int(known) + 1
    ids = np.stack(ids, axis=1)
    users = torch.zeros(rows, dtype=torch.int32)
    whole = Part(torch.from_numpy(ids), torch.from_numpy(labels), users)
    parts = (whole.cut(0, val_from), whole.cut(val_from, test_from), whole.cut(test_from, rows))
    return check(Behavior("census", fields, CENSUS_GROUPS, *parts, _digest(ids, labels), note))


def _census_paths(root: Path) -> list[Path]:
    """Those of the two files that are there, packed or not."""
    found = []
    for name in CENSUS_FILES:
        spellings = (root / "census" / f"{name}.gz", root / "census" / name)
        found += [path for path in spellings if path.exists()][:1]
    return found


def _read_census(path: Path) -> list[list[str]]:
    """The cells of every row, money in half octaves."""
    rows = []
    with reading(path) as at:
        for cells in csv.reader(lines(at, whole=True), skipinitialspace=True):
            expected = len(CENSUS_COLUMNS)
            at.need(len(cells) == expected, f"{len(cells)} columns, {expected} are expected")
            at.need(at.line <= CENSUS_LIMIT, f"has more than {CENSUS_LIMIT:,} rows")
            row = dict(zip(CENSUS_COLUMNS, cells))
            at.one_of(row["income"], INCOMES, "income")
            at.one_of(row["marital_status"], MARITAL, "marital status")
            for name in MONEY:
                amount = at.number(row[name], name)
                at.need(amount >= 0, f"{name} is {amount}, below 0")
                row[name] = str(math.ceil(2 * math.log2(1 + amount)))
            rows.append(list(row.values()))
    return rows


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
        return bool(_census_paths(root))
    return all(path.exists() for path in _kuairand_paths(name, root))


def download_size(name: str, root: Path) -> int | None:
    """Bytes that `load` would download; None where the publisher's size is not in the table."""
    return 0 if is_here(name, root) else download.DATASETS[name].size


PUBLISHED = {  # rows, users
    "kuairand-1k": (11_713_045, 1_000),
    "kuairand-pure": (1_436_609, 27_285),
    "census": (299_285, 0),
}


def nominal(name: str, hash_bits: int = 20) -> Behavior:
    """For --dry-run before a download: the published number of rows over tables of the right order
    of size.
    """
    rows, users = PUBLISHED[name]
    if name == "census":
        groups = CENSUS_GROUPS
        fields = dict.fromkeys(CENSUS_FIELDS, 64)
    else:
        groups = GROUPS
        fields = {"user_id": users + 1, **dict.fromkeys((*USER_COLUMNS, *VIDEO_COLUMNS), 64)}
        fields["video_id"] = 2**hash_bits
        fields |= dict.fromkeys(VIDEO_HASHED, 2 ** (hash_bits - 2)) | PLAIN
    nothing = torch.zeros(1, dtype=torch.int32)  # expanded: no memory
    num_tasks = sum(len(tasks) for tasks in groups.values())
    labels = nothing.to(torch.uint8).expand(rows, num_tasks)
    part = Part(nothing.expand(rows, len(fields)), labels, nothing.expand(rows))
    note = f"{name} is not here yet: its size is the published one, the smaller tables have 64 rows"
    return Behavior(name, fields, groups, part, part, part, "", note)
