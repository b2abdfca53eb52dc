"""Graphs whose nodes are to be classified: generated, public, or the reader's own.

    contextual_sbm(seed)      two kinds of nodes: one told by its features, the other by its
                              neighbours
    load(name or path)        a public graph (downloaded once, see download.py), or a file or folder
    of your own

Every graph comes out as a `Graph`: both directions of every edge, no loops, no duplicates, checked.
Your own graph is an .npz with these arrays (the names of PyTorch Geometric work too):

    node_features or x       [nodes, features]
    node_labels or y         [nodes]; -1 or NaN: unlabelled; text, and numbers with gaps, become
                             0, 1, ... in their order, and a printed line says so
    edges or edge_index      [edges, 2] or [2, edges]; two of them: a row each in edges, a column
                             each in edge_index
    train_masks, val_masks, test_masks   [splits, nodes] or [nodes] (train_mask ...), true or false
    train_idx, val_idx, test_idx         [splits, members] or [members]: node numbers instead

Without a split, ten random ones of 50/25/25 are drawn. Any other array is refused by its name, edge
weights too: no method here uses them. Nothing is unpickled: LINKX publishes its splits as pickles,
which are read in a world without names, where nothing can be imported or called.
"""

import hashlib
import importlib.util
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import download
from data.reading import (
    MOST_BYTES,
    Place,
    cached,
    lines,
    open_file,
    parse_json,
    read_bytes,
    read_npy,
    read_npz,
    reading,
    say_once,
    table,
)

SIZES = {  # name: (nodes, undirected edges, features, classes), as their publishers count
    "roman_empire": (22_662, 32_927, 300, 18),
    "amazon_ratings": (24_492, 93_050, 300, 5),
    "minesweeper": (10_000, 39_402, 7, 2),
    "tolokers": (11_758, 519_000, 10, 2),
    "questions": (48_921, 153_540, 301, 2),
    "actor": (7_600, 26_659, 932, 5),
    "chameleon_filtered": (890, 8_854, 2_325, 5),
    "squirrel_filtered": (2_223, 46_998, 2_089, 5),
    "ogbn-arxiv": (169_343, 1_166_243, 128, 40),
    "ogbn-products": (2_449_029, 61_859_140, 100, 47),
    "flickr": (89_250, 449_878, 500, 7),
    "penn94": (41_554, 1_362_229, 4_814, 2),
    "pokec": (1_632_803, 30_622_564, 65, 2),
    "twitch-gamer": (168_114, 6_797_557, 7, 2),
}
BY_HAND = {  # no address that a program can fetch
    "flickr": (
        ("adj_full.npz", "feats.npy", "class_map.json", "role.json"),
        "the Google Drive folder named in github.com/GraphSAINT/GraphSAINT",
    ),
    "pokec": (
        ("pokec.mat", "pokec-splits.npy"),
        "drive.google.com/file/d/1dNs5E7BrWJbgcHeQ_zuy5Ozp2tRCWG0y and "
        "/1ZhpAiyTNc0cE_hhgyiqxnkKREHK7MK-_ (LINKX)",
    ),
}
PARTS = ("train", "val", "test")


class Graph(NamedTuple):
    name: str
    x: Tensor  # [nodes, features] float32
    edge_index: (
        Tensor  # [2, edges] int64: sources, targets; both directions, no loops, no duplicates
    )
    y: Tensor  # [nodes] int64; -1: unlabelled
    train_mask: Tensor  # [splits, nodes] bool; [nodes] after split(i)
    val_mask: Tensor
    test_mask: Tensor
    num_classes: int
    kind: Tensor | None = None  # [nodes] bool, if generated: do the features tell the class
    note: str = ""  # what a reader should know about the splits

    @property
    def num_splits(self) -> int:
        return len(self.train_mask)

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 over features, edges, labels and masks."""
        hashed = hashlib.sha256()
        for part in (
            self.x,
            self.edge_index,
            self.y,
            self.train_mask,
            self.val_mask,
            self.test_mask,
        ):
            hashed.update(part.contiguous().numpy())
        return hashed.hexdigest()[:12]

    def split(self, index: int) -> "Graph":
        """The same graph with one of its splits: masks [nodes]."""
        masks = {f"{part}_mask": getattr(self, f"{part}_mask")[index] for part in PARTS}
        return self._replace(**masks)


def clean_edges(edge_index: Tensor, num_nodes: int) -> Tensor:
    """No loops, no duplicates, both directions, sorted by target, then source. [2, edges] int64."""
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    source, target = torch.cat([source, target]), torch.cat([target, source])
    key = (target * num_nodes + source).unique()  # sorted; needs int64
    return torch.stack([key % num_nodes, key // num_nodes])


# --------------------------------------------------------------------------------------------------
# Arrays of any origin -> a checked Graph
# --------------------------------------------------------------------------------------------------


def build_graph(
    name: str,
    x: object,
    edges: object,
    y: object,
    masks: Iterable[object] | None = None,
    **more: object,
) -> Graph:
    """Arrays of any origin into a checked Graph. `name` (a file) begins every message.

    x [nodes, features]; edges [edges, 2]; y [nodes]; masks (train, val, test), each [nodes] or
    [splits, nodes]. Raises ValueError naming the row for edges out of range, NaN, labels that are
    missing where a split needs one, overlapping or empty splits, shapes that do not fit, and
    whatever another type would change.
    """
    with reading(name) as at:
        x = _features(at, np.asarray(x))
        num_nodes = len(x)
        y = _labels(at, np.asarray(y), num_nodes)
        edges = np.asarray(edges)
        at.need(
            edges.ndim == 2 and edges.shape[1] == 2,
            f"edges are {list(edges.shape)}; needed: [edges, 2]",
        )
        edges = _node_numbers(at, "edge in row {} joins", edges, num_nodes)
        if masks is None:
            masks = _random_splits(y)
            more = {"note": "no published split: ten random ones, 50/25/25", **more}
        masks = [
            _mask(at, part, np.asarray(mask), num_nodes)
            for part, mask in zip(PARTS, masks, strict=True)
        ]
        _check_splits(at, masks, y)
        edge_index = clean_edges(torch.from_numpy(edges).T, num_nodes)
        tensors = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in masks]
        labels = torch.from_numpy(y)
        return Graph(
            name,
            torch.from_numpy(x),
            edge_index,
            labels,
            *tensors,
            num_classes=int(y.max()) + 1,
            **more,
        )


def _first(wrong: np.ndarray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _refuse_type(at: Place, what: str, array: np.ndarray, kinds: str) -> None:
    at.need(
        array.dtype.kind in kinds, f"{what} are of type {array.dtype}; plain numbers are needed"
    )


def _features(at: Place, x: np.ndarray) -> np.ndarray:
    """[nodes, features] float32.

    What float32 would blur is refused; columns of very different scale are printed.
    """
    _refuse_type(at, "features", x, "biuf")
    at.need(x.ndim == 2 and x.size > 0, f"features are {list(x.shape)}; needed: [nodes, features]")
    bad = _first(~np.isfinite(x).all(axis=1))
    at.need(bad is None, f"features of node {bad} hold NaN or infinity")
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(x, dtype=np.float32)
    bad = _first(~np.isfinite(single).all(axis=1))
    at.need(bad is None, f"features of node {bad} are too large for float32")
    span = x.max(axis=0).astype(np.float64) - x.min(axis=0)  # [features]
    if x.dtype not in (np.float32, np.float16, np.bool_, np.uint8, np.int8):
        # Time stamps and ids are large against their differences: neighbours would become equal.
        error = np.abs(single.astype(np.float64) - x).max(axis=0)
        whole = (x == np.floor(x)).all(axis=0)
        bad = _first((span > 0) & ((whole & (error > 0)) | (error > 1e-4 * span)))
        at.need(
            bad is None,
            f"feature column {bad} loses digits in float32; subtract its mean, in float64, first",
        )
    usual = np.median(span[span > 0]) if (span > 0).any() else 1.0
    wide = np.flatnonzero(span >= 1e3 * usual)
    if len(wide):
        columns = ", ".join(map(str, wide[:5]))
        say_once(
            f"{at.path}: feature columns {columns} span 1,000 times the usual; standardize them"
        )
    return single


def _labels(at: Place, y: np.ndarray, num_nodes: int) -> np.ndarray:
    """[nodes] int64, classes 0, 1, ... without a gap, -1: unlabelled.

    A printed line says what was renumbered.
    """
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    at.need(
        y.shape == (num_nodes,),
        f"features of {num_nodes} nodes and labels {list(y.shape)} do not fit",
    )
    if y.dtype.kind in "US":
        known, known_at = np.ones(num_nodes, bool), "labels are text"
    else:
        _refuse_type(at, "labels", y, "biuf")
        y = np.where(np.isnan(y), -1, y) if y.dtype.kind == "f" else y
        bad = _first((y != np.floor(y)) | (y < -1) | (y > 2**31))
        at.need(
            bad is None,
            f"the label of node {bad} is {None if bad is None else y[bad]}; classes are 0, 1, ...",
        )
        y = y.astype(np.int64)
        known, known_at = y >= 0, "labels have gaps"
    classes, numbers = np.unique(y[known], return_inverse=True)
    at.need(len(classes) > 1, f"{len(classes)} class(es); at least two are needed")
    if classes.tolist() != list(range(len(classes))):
        ends = f"{classes[0]} .. {classes[-1]}"
        count = len(classes)
        say_once(f"{at.path}: {known_at}: the {count} classes {ends} are numbered 0 .. {count - 1}")
    labels = np.full(num_nodes, -1)
    labels[known] = numbers
    return labels


def _node_numbers(at: Place, what: str, array: np.ndarray, num_nodes: int) -> np.ndarray:
    """Whole numbers 0 .. num_nodes - 1 as int64, of any shape. what: "edge in row {} joins"."""
    if array.size == 0:
        return array.astype(np.int64)
    _refuse_type(at, f"{what.split()[0]} numbers", array, "iuf")
    good = (array >= 0) & (array < num_nodes)
    if array.dtype.kind == "f":
        good &= array == np.floor(array)
    bad = _first(~good.reshape(len(array), -1).all(axis=1))
    if bad is not None:
        at.refuse(f"{what.format(bad)} {array[bad].tolist()}; there are nodes 0 .. {num_nodes - 1}")
    return array.astype(np.int64)


def _mask(at: Place, part: str, mask: np.ndarray, num_nodes: int) -> np.ndarray:
    """[splits, nodes] bool from truth values, or from ones and zeros."""
    _refuse_type(at, f"{part} masks", mask, "biuf")
    mask = np.atleast_2d(mask)
    if mask.shape[0] == num_nodes != mask.shape[1]:
        say_once(f"{at.path}: {part} masks {list(mask.shape)} are read as [nodes, splits]")
        mask = mask.T
    at.need(
        mask.shape[1] == num_nodes,
        f"{part} masks are {list(mask.shape)}; needed: [splits, {num_nodes}]",
    )
    bad = _first(((mask != 0) & (mask != 1)).any(axis=0))  # NaN, too
    at.need(
        bad is None,
        f"{part} masks of node {bad} hold neither 0 nor 1; node numbers belong into {part}_idx",
    )
    return mask.astype(bool)


def _check_splits(at: Place, masks: Sequence[np.ndarray], y: np.ndarray) -> None:
    shapes = {mask.shape for mask in masks}
    at.need(
        len(shapes) == 1,
        f"masks are {', '.join(map(str, sorted(shapes)))}; as many splits of each are needed",
    )
    for part, mask in zip(PARTS, masks):
        bad = _first(~mask.any(axis=1))
        at.need(bad is None, f"the {part} set of split {bad} is empty")
        bad = _first((mask & (y < 0)).any(axis=0))
        at.need(bad is None, f"node {bad} is in a {part} set and has no label")
    bad = _first((np.sum(masks, axis=0) > 1).any(axis=0))
    at.need(bad is None, f"node {bad} is in two of train, val and test of one split")


def _random_splits(y: np.ndarray, num_splits: int = 10) -> np.ndarray:
    masks = np.zeros((3, num_splits, len(y)), dtype=bool)
    labelled = np.flatnonzero(y >= 0)
    for i in range(num_splits):
        order = np.random.default_rng(i).permutation(labelled)
        for part, members in enumerate(np.split(order, [len(order) // 2, 3 * len(order) // 4])):
            masks[part, i, members] = True
    return masks


def _member_masks(at: Place, num_nodes: int, splits: Sequence[Sequence]) -> np.ndarray:
    """Node numbers (train, val, test) of every split -> masks [3, splits, nodes]."""
    masks = np.zeros((3, len(splits), num_nodes), dtype=bool)
    for i, split in enumerate(splits):
        for part, members in enumerate(split):
            members = _node_numbers(
                at, f"{PARTS[part]} set, entry {{}} is", np.asarray(members).reshape(-1), num_nodes
            )
            masks[part, i, members] = True
    return masks


# --------------------------------------------------------------------------------------------------
# Generated graphs
# --------------------------------------------------------------------------------------------------


def contextual_sbm(
    seed: int,
    num_nodes: int = 3000,
    num_classes: int = 5,
    num_features: int = 16,
    mu_rich: float = 4.0,
    mu_poor: float = 0.3,
    degree_rich: int = 20,
    degree_poor: int = 16,
    homophily_rich: float = 0.2,
    homophily_poor: float = 0.85,
    cross: float = 0.05,
    shift: int = 0,
    train_share: float = 0.1,
    val_share: float = 0.2,
) -> Graph:
    """A stochastic block model with two kinds of nodes, half of each, so that the right split of
    the work is known.

    mu_*         length of the class direction in the features, beside noise of variance 1 in each
    degree_*     mean degree; every node draws half of it as partners
    homophily_*  probability that a partner is of the favoured class; 1 / num_classes: neighbours
                 say nothing
    cross        probability that a partner is of the other kind, of any class
    shift        the favoured class is the own one plus shift: 0 homophilous, 1 heterophilous
    Raises ValueError for impossible sizes and probabilities.
    """
    probabilities = {
        "homophily_rich": homophily_rich,
        "homophily_poor": homophily_poor,
        "cross": cross,
    }
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; a probability is needed")
    if (
        num_classes < 2
        or num_features < num_classes
        or min(degree_rich, degree_poor) < 2
        or mu_rich < 0
        or mu_poor < 0
    ):
        raise ValueError(
            f"num_classes is {num_classes}, num_features {num_features}, degrees {degree_rich} "
            f"and {degree_poor}, mu {mu_rich} and {mu_poor}; needed: "
            "2 <= num_classes <= num_features, degrees >= 2, mu >= 0"
        )
    num_train = round(train_share * num_nodes)
    num_val = round(val_share * num_nodes)
    if min(num_train, num_val, num_nodes - num_train - num_val) < num_classes:
        raise ValueError(
            f"{num_nodes} nodes with train_share {train_share} and val_share {val_share} leave "
            f"a set smaller than num_classes = {num_classes}"
        )
    rng = np.random.default_rng(seed)
    y = rng.integers(num_classes, size=num_nodes)
    kind = rng.random(num_nodes) < 0.5
    group = num_classes * kind + y
    members = np.argsort(group, kind="stable")  # the nodes, group by group
    counts = np.bincount(group, minlength=2 * num_classes)
    if not counts.all():
        raise ValueError(f"{num_nodes} nodes are too few: a class of one kind has no member")
    orthogonal, _ = np.linalg.qr(rng.standard_normal((num_features, num_classes)))
    directions = orthogonal.T  # [classes, features]
    length = np.where(kind, mu_rich, mu_poor)[:, None]  # [nodes, 1]
    x = rng.standard_normal((num_nodes, num_features)) + length * directions[y]

    source = np.repeat(np.arange(num_nodes), np.where(kind, degree_rich // 2, degree_poor // 2))
    own_kind = kind[source]
    own_class = y[source]
    favoured = (own_class + shift) % num_classes
    other = (favoured + rng.integers(1, num_classes, size=len(source))) % num_classes
    is_favoured = rng.random(len(source)) < np.where(own_kind, homophily_rich, homophily_poor)
    crosses = rng.random(len(source)) < cross
    partner_class = np.where(is_favoured, favoured, other)
    partner_class = np.where(crosses, rng.integers(num_classes, size=len(source)), partner_class)
    partner_group = num_classes * (own_kind ^ crosses) + partner_class
    starts = counts.cumsum() - counts
    picked = (rng.random(len(source)) * counts[partner_group]).astype(np.int64)
    target = members[starts[partner_group] + picked]

    masks = np.zeros((3, num_nodes), dtype=bool)
    order = rng.permutation(num_nodes)
    parts = np.split(order, [num_train, num_train + num_val])
    for part, nodes in enumerate(parts):
        masks[part, nodes] = True
    edges = np.stack([source, target], axis=1)
    return build_graph(f"generated graph {seed}", x, edges, y, masks, kind=torch.from_numpy(kind))


def stand_in(name: str) -> Graph:
    """A random graph of the size of a public one, to see what a run would cost before anything is
    downloaded.
    """
    num_nodes, num_edges, num_features, num_classes = SIZES[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_nodes, num_features), dtype=np.float32)
    edges = rng.integers(num_nodes, size=(num_edges, 2))
    y = rng.integers(num_classes, size=num_nodes)
    y[0] = num_classes - 1
    return build_graph(f"random graph of the size of {name}", x, edges, y)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def load(name: str | Path, data_dir: str | Path | None = None) -> Graph:
    """A public graph by name, or your own: an .npz file, or a folder in the layout of OGB, Flickr
    or twitch-gamer.

    Raises ValueError for a damaged or unknown file, FileNotFoundError with what to put where for
    what cannot be downloaded, download.DownloadError when a download fails.
    """
    path = Path(name).expanduser()
    if str(name) not in SIZES:
        if not path.exists():
            raise ValueError(
                f"dataset {str(name)!r} is neither a file or folder nor one of {', '.join(SIZES)}"
            )
        graph = _read_folder(path) if path.is_dir() else read_npz_graph(name)
        return graph._replace(name=str(name))
    folder = _by_hand(name, data_dir) if name in BY_HAND else download.fetch(name, data_dir)
    match name:
        case "flickr":
            graph = read_flickr(folder)
        case "ogbn-arxiv":
            graph = read_ogb(folder / "arxiv", "time")
        case "ogbn-products":
            graph = read_ogb(folder / "products", "sales_ranking")
        case "twitch-gamer":
            graph = read_twitch(folder)
        case "penn94":
            graph = read_facebook(folder / "Penn94.mat", folder / "fb100-Penn94-splits.npy")
        case "pokec":
            graph = read_pokec(folder / "pokec.mat", folder / "pokec-splits.npy")
        case _:
            graph = read_npz_graph(folder / f"{name}.npz")
    return graph._replace(name=name)


def is_here(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether load(name) would find its files without a download (a path: always)."""
    folder = download.root(data_dir) / name
    files = BY_HAND[name][0] if name in BY_HAND else (download.MARKER,)
    return name not in SIZES or all((folder / file).is_file() for file in files)


def download_size(name: str) -> int | None:
    """Bytes that load(name) would download; 0 for what is put there by hand, None if its publisher
    does not say.
    """
    return 0 if name in BY_HAND else download.DATASETS[name].size


def _by_hand(name: str, data_dir: str | Path | None) -> Path:
    files, source = BY_HAND[name]
    folder = download.root(data_dir) / name
    missing = ", ".join(file for file in files if not (folder / file).is_file())
    if missing:
        raise FileNotFoundError(
            f"{name} has no direct address: get {missing} from {source}, put into {folder}"
        )
    return folder


def _read_folder(folder: Path) -> Graph:
    if (folder / "adj_full.npz").exists():
        return read_flickr(folder)
    if (folder / "large_twitch_edges.csv").exists() or (folder / "twitch_gamers").exists():
        return read_twitch(folder)
    splits = sorted(path.name for path in (folder / "split").glob("*") if path.is_dir())
    if (folder / "raw").is_dir() and splits:
        if len(splits) > 1:
            say_once(f"{folder}: of the splits {', '.join(splits)} the first is used")
        return read_ogb(folder, splits[0])
    raise ValueError(
        f"{folder} holds no graph: no raw/ and split/, adj_full.npz, or large_twitch_edges.csv"
    )


def read_npz_graph(path: str | Path) -> Graph:
    """An .npz with the arrays that the head of this file lists: heterophilous-graphs', PyG's, or
    your own.
    """
    arrays = read_npz(path, MOST_BYTES)
    with reading(path) as at:
        x = _one_of(at, arrays, "node_features", "x")
        y = _one_of(at, arrays, "node_labels", "y")
        is_pyg = "edge_index" in arrays  # there two edges are [2, 2], too, a column each
        edges = _one_of(at, arrays, "edges", "edge_index")
        masks = [
            _one_of(at, arrays, f"{part}_masks", f"{part}_mask", needed=False) for part in PARTS
        ]
        members = []
        for part in PARTS:
            names = [
                f"{other}_{end}" for other in (part, "valid") for end in ("idx", "index", "indices")
            ]
            members.append(_one_of(at, arrays, *names[: 6 if part == "val" else 3], needed=False))
        at.need(
            not arrays,
            f"holds {', '.join(arrays)}, which no method here uses: take it out or rename it",
        )
        given = [split for split in (masks, members) if any(part is not None for part in split)]
        at.need(len(given) < 2, "has masks and node numbers of splits; give one of them")
        whole = all(part is not None for part in given[0]) if given else True
        at.need(whole, "has only a part of a split; give train, val and test, or none of them")
        if edges.ndim == 2 and edges.shape[0] == 2 and (edges.shape[1] != 2 or is_pyg):
            edges = edges.T
        if given and given[0] is members:
            rows = [np.atleast_2d(part) for part in members]
            at.need(
                len({len(part) for part in rows}) == 1,
                "has more splits of one part than of another",
            )
            masks = _member_masks(at, len(x), list(zip(*rows)))
    return build_graph(str(path), x, edges, y, masks if given else None)


def _one_of(
    at: Place, arrays: dict[str, np.ndarray], *names: str, needed: bool = True
) -> np.ndarray | None:
    """The array that has one of these names, taken out of `arrays`."""
    found = [name for name in names if name in arrays]
    at.need(len(found) < 2, f"has both {' and '.join(found)}; keep one of them")
    if needed:
        at.need(bool(found), f"lacks {names[0]}; it holds {', '.join(arrays) or 'nothing'}")
    return arrays.pop(found[0]) if found else None


def _csv(path: Path, dtype: type, header: str = "") -> np.ndarray:
    """A csv file (or .csv.gz) of numbers: [rows, columns]."""
    with reading(path) as at:
        rows = lines(at, whole=True)
        if header:
            at.need(next(rows) == header, f"the header is not {header}")
        return np.loadtxt(rows, dtype=dtype, delimiter=",", ndmin=2, comments=None)


def read_ogb(folder: str | Path, split: str) -> Graph:
    """raw/{edge,node-feat,node-label}.csv.gz and split/<split>/{train,valid,test}.csv.gz, as OGB
    packs them.

    Parsing takes minutes, so the arrays are kept in parsed/, and used while the files have the same
    content.
    """
    folder = Path(folder)
    dtypes = {"node-feat": np.float32, "edge": np.int64, "node-label": np.float64}
    sources = {folder / "raw" / f"{name}.csv.gz": dtype for name, dtype in dtypes.items()}
    for part in ("train", "valid", "test"):
        sources[folder / "split" / split / f"{part}.csv.gz"] = np.int64

    def parse(into: Path) -> dict:
        print(f"reading {folder} (once; minutes for a large graph)", file=sys.stderr)
        for path, dtype in sources.items():
            np.save(into / path.name.removesuffix(".csv.gz"), _csv(path, dtype))
        return {}

    with cached(folder / "parsed", list(sources), "ogb", parse) as (kept, _):
        arrays = [read_npy(kept / f"{path.name.removesuffix('.csv.gz')}.npy") for path in sources]
    x, edges, y, *members = arrays
    with reading(folder / "split" / split) as at:
        masks = _member_masks(at, len(x), [members])
    return build_graph(str(folder), x, edges, y, masks)


def read_flickr(folder: str | Path) -> Graph:
    """adj_full.npz (a CSR matrix), feats.npy, class_map.json, role.json: the files of
    GraphSAINT.
    """
    folder = Path(folder)
    adjacency = read_npz(folder / "adj_full.npz")
    with reading(folder / "adj_full.npz") as at:
        pointers, targets, weights = at.take(
            adjacency, "", "indptr indices data", spare="shape format"
        )
        at.need(
            bool((weights == 1).all()), "has edge weights other than 1; no method here uses them"
        )
        pointers = _node_numbers(at, "indptr, entry {} is", pointers, len(targets) + 1)
        counts = np.diff(pointers)
        at.need(
            pointers[0] == 0 and pointers[-1] == len(targets) and counts.min() >= 0,
            "indptr does not fit indices",
        )
        sources = np.repeat(np.arange(len(counts)), counts)
    x = read_npy(folder / "feats.npy")
    with reading(folder / "class_map.json") as at:
        classes = parse_json(read_bytes(at.path))
        nodes = [str(node) for node in range(len(x))]
        at.need(classes.keys() == set(nodes), f"does not name the nodes 0 .. {len(x) - 1}")
        at.need(
            all(type(label) is int for label in classes.values()),
            "holds labels that are no whole numbers",
        )
        y = [classes[node] for node in nodes]
    with reading(folder / "role.json") as at:
        roles = at.take(parse_json(read_bytes(at.path)), "", "tr va te")
        masks = _member_masks(at, len(x), [[at.items(role, "a role") for role in roles]])
    return build_graph(str(folder), x, np.stack([sources, targets], axis=1), y, masks)


TWITCH_COLUMNS = (
    "views", "life_time", "created_at", "updated_at", "dead_account", "affiliate", "language",
    "numeric_id", "mature",
)  # fmt: skip


def read_twitch(folder: str | Path) -> Graph:
    """large_twitch_{edges,features}.csv of SNAP; label: mature.

    With the five LINKX splits if they lie there.
    """
    folder = Path(folder)
    root = folder / "twitch_gamers" if (folder / "twitch_gamers").is_dir() else folder
    x, y = [], []
    languages: dict[str, int] = {}
    with reading(root / "large_twitch_features.csv") as at:
        for row in table(at, TWITCH_COLUMNS):
            views, life_time, created, updated, dead, affiliate, language, node, mature = row
            at.need(node == str(len(x)), f"node {node}, where {len(x)} is expected")
            dates = [_date(at, date) for date in (created, updated)]
            counts = [at.number(cell, "a cell") for cell in (views, life_time, dead, affiliate)]
            number = languages.setdefault(language, len(languages))
            x.append([*counts[:2], *dates, counts[2], number, counts[3]])
            y.append(at.one_of(mature, ("0", "1"), "mature"))
        at.need(len(x) > 1, "holds no nodes")
        at.need(not at.unused, f"has unknown columns: {', '.join(sorted(at.unused))}")
    x = np.array(x)
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0, ddof=1), 1e-12)  # float64: dates are 2e7
    edges = _csv(root / "large_twitch_edges.csv", np.int64, header="numeric_id_1,numeric_id_2")
    splits = folder / "twitch-gamer-splits.npy"
    return build_graph(
        str(folder), x, edges, y, read_linkx_splits(splits, len(x)) if splits.exists() else None
    )


def _date(at: Place, text: str) -> float:
    """2018-10-12 -> 20181012."""
    parts = text.split("-")
    at.need([len(part) for part in parts] == [4, 2, 2], f"{text!r} is no date like 2018-10-12")
    return at.number("".join(parts), "a date")


# SciPy's reader of .mat crashes the interpreter on most damaged files: a process of its own reads
# them.
READ_MAT = """
import sys, numpy, scipy.io
arrays = {}
for name, value in scipy.io.loadmat(sys.argv[1]).items():
    if hasattr(value, "tocoo"):
        value = value.tocoo()
        arrays |= {name + "/row": value.row, name + "/col": value.col, name + "/data": value.data}
    elif not name.startswith("__"):
        arrays[name] = value
numpy.savez(sys.argv[2], **arrays)
"""


def read_mat(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a MATLAB file; a sparse matrix A comes as A/row, A/col and A/data."""
    with reading(path) as at:
        open_file(path).close()
        has_scipy = importlib.util.find_spec("scipy") is not None
        at.need(has_scipy, "needs SciPy: pip install -r requirements-full.txt")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "arrays.npz"
            command = [sys.executable, "-c", READ_MAT, str(Path(path).expanduser()), str(copy)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            last_line = done.stderr.strip().rsplit("\n", 1)[-1]
            reason = last_line or f"its reader crashed, code {done.returncode}"
            at.need(done.returncode == 0, f"is not a readable .mat file ({reason[:200]})")
            return read_npz(copy)


def read_facebook(path: str | Path, splits: str | Path | None = None) -> Graph:
    """A facebook100 .mat: label gender (0: unlabelled), features the other six columns of
    local_info, one-hot.
    """
    found = read_mat(path)
    with reading(path) as at:
        source, target, weights, info = at.take(found, "", "A/row A/col A/data local_info")
        at.need(bool((weights == 1).all()), "A holds something else than ones")
        at.need(
            info.ndim == 2 and info.shape[1] == 7,
            f"local_info is {list(info.shape)}; seven columns are needed",
        )
        info = _node_numbers(at, "local_info, row {} is", info, 2**31)
        gender = info[:, 1]
        at.need(gender.max() <= 2, f"gender is 0, 1 or 2, not {gender.max()}")
        columns = [info[:, [column]] == np.unique(info[:, column]) for column in (0, 2, 3, 4, 5, 6)]
        edges = np.stack([source, target], axis=1)
    x = np.concatenate(columns, axis=1)
    masks = read_linkx_splits(splits, len(x)) if splits else None
    return build_graph(str(path), x, edges, gender - 1, masks)


def read_pokec(path: str | Path, splits: str | Path | None = None) -> Graph:
    """pokec.mat of LINKX: edge_index [2, edges], node_feat, label."""
    with reading(path) as at:
        edges, x, y = at.take(read_mat(path), "", "edge_index node_feat label", spare="num_nodes")
    masks = read_linkx_splits(splits, len(x)) if splits else None
    return build_graph(str(path), x, edges.T, y.ravel(), masks)


def read_linkx_splits(path: str | Path, num_nodes: int) -> np.ndarray:
    """LINKX's *-splits.npy: a pickled array of dicts {"train", "valid", "test"} of node numbers,
    read as plain data.
    """
    with reading(path) as at, open_file(path) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, _ = read_header[version](file)
        splits = _PlainPickle(file).load()
        at.need(shape == (len(splits),), f"its header says {shape}, it holds {len(splits)} splits")
        return _member_masks(
            at, num_nodes, [at.take(split, "", "train valid test") for split in splits]
        )


class _Stub(list):
    """Stands for an array in a pickle, and for its type: of an array's state the list of elements
    is kept.
    """

    def __init__(self, *arguments: object):
        super().__init__()

    def __setstate__(self, state: tuple) -> None:
        if len(state) == 5 and isinstance(state[4], list):  # version, shape, dtype, order, elements
            self.extend(state[4])

    def append(self, element: object) -> None:
        """A method of its own: a damaged file may append to the type instead of a list of it, and
        Python 3.13.0 crashes when list.append is called without a list.
        """
        super().append(element)


class _PlainPickle(pickle._Unpickler):
    """Python's own reader of pickles in a world that holds nothing: no name is imported, nothing
    can be called.
    """

    STUBS = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
    STUBS |= {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" not in self.STUBS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return _Stub
