"""Graphs whose nodes are to be classified: generated, public, or the reader's own.

    contextual_sbm(seed)      two kinds of nodes: one told by its features, the other by its neighbours
    load(name or path)        a public graph (downloaded once, see download.py), or a file or folder of your own

Every graph comes out as a `Graph`: both directions of every edge, no loops, no duplicates, checked. Your own graph is
an .npz with node_features [nodes, features], node_labels [nodes] (-1: unlabelled), edges [edges, 2] and, if you
have them, train_masks, val_masks, test_masks [nodes] or [splits, nodes]; without masks, ten splits 50/25/25 are drawn.

Nothing is unpickled. The one published format that needs it (LINKX splits) is read opcode by opcode as plain data.
"""

import csv
import hashlib
import json
import os
import pickletools
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import download

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
        "drive.google.com/file/d/1dNs5E7BrWJbgcHeQ_zuy5Ozp2tRCWG0y and /1ZhpAiyTNc0cE_hhgyiqxnkKREHK7MK-_ (LINKX)",
    ),
}
MOST_BYTES = 16 << 30  # that compressed arrays may unpack to: a small file must not fill the memory


class Graph(NamedTuple):
    name: str
    x: Tensor  # [nodes, features] float32
    edge_index: Tensor  # [2, edges] int64, row 0 source, row 1 target; both directions, no loops, no duplicates
    y: Tensor  # [nodes] int64; -1: unlabelled
    train_mask: Tensor  # [splits, nodes] bool; [nodes] after split(i)
    val_mask: Tensor
    test_mask: Tensor
    num_classes: int
    kind: Tensor | None = None  # [nodes] bool, generated graphs: True where the features tell the class
    note: str = ""  # what a reader should know about the splits

    @property
    def num_splits(self) -> int:
        return len(self.train_mask)

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 over features, edges, labels and masks."""
        parts = (self.x, self.edge_index, self.y, self.train_mask, self.val_mask, self.test_mask)
        hashed = hashlib.sha256()
        for part in parts:
            hashed.update(part.contiguous().numpy())
        return hashed.hexdigest()[:12]

    def split(self, index: int) -> "Graph":
        """The same graph with one of its splits: masks [nodes]."""
        masks = {name: getattr(self, name)[index] for name in ("train_mask", "val_mask", "test_mask")}
        return self._replace(**masks)


def clean_edges(edge_index: Tensor, num_nodes: int, symmetric: bool = True) -> Tensor:
    """No loops, no duplicates, both directions (if symmetric), sorted by target, then source. [2, edges] int64.

    Raises ValueError for another shape or a node out of range.
    """
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(f"edge_index is {list(edge_index.shape)}; needed: [2, edges]")
    if edge_index.numel() and not (0 <= int(edge_index.min()) and int(edge_index.max()) < num_nodes):
        raise ValueError(f"edge_index holds nodes {int(edge_index.min())} .. {int(edge_index.max())} of {num_nodes}")
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    if symmetric:
        source, target = torch.cat([source, target]), torch.cat([target, source])
    key = (target * num_nodes + source).unique()  # sorted; needs int64
    return torch.stack([key % num_nodes, key // num_nodes])


def homophily(graph: Graph, of: Tensor | None = None) -> float:
    """Share of edges that join equal labels; `of` [nodes] bool counts only edges into those nodes."""
    source, target = graph.edge_index
    counted = (graph.y[source] >= 0) & (graph.y[target] >= 0)
    if of is not None:
        counted &= of[target]
    return float((graph.y[source] == graph.y[target])[counted].float().mean())


def build_graph(
    name: str, x: object, edges: object, y: object, masks: Iterable[object] | None = None, **more: object
) -> Graph:
    """Arrays of any origin into a checked Graph. `name` (a file) begins every message.

    x [nodes, features]; edges [edges, 2]; y [nodes], negative or NaN: unlabelled; masks (train, val, test), each bool
    [nodes] or [splits, nodes]. Raises ValueError naming the row for edges out of range, NaN, labels that are missing
    where a split needs one, overlapping or empty splits, shapes that do not fit, and arrays of Python objects.
    """
    x, edges, y = _numbers(name, "features", x), _numbers(name, "edges", edges), _numbers(name, "labels", y)
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or not x.size:
        raise ValueError(f"{name}: features {list(x.shape)} and labels {list(y.shape)} do not fit; a row per node each")
    if edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(f"{name}: edges are {list(edges.shape)}; needed: [edges, 2]")
    num_nodes = len(x)
    if (bad := _first(~np.isfinite(x).all(axis=1))) is not None:
        raise ValueError(f"{name}: features of node {bad} hold NaN or infinity")
    if edges.dtype.kind not in "iu" and (bad := _first((edges != np.floor(edges)).any(axis=1))) is not None:
        raise ValueError(f"{name}: edge in row {bad} is {edges[bad].tolist()}; whole node numbers are needed")
    if (bad := _first(((edges < 0) | (edges >= num_nodes)).any(axis=1))) is not None:
        raise ValueError(f"{name}: edge in row {bad} joins {edges[bad].tolist()}; there are nodes 0 .. {num_nodes - 1}")
    y = np.where(np.isnan(y), -1, y) if y.dtype.kind == "f" else y
    if (bad := _first(y != np.floor(y))) is not None:
        raise ValueError(f"{name}: the label of node {bad} is {y[bad]}; classes are 0, 1, 2, ...")
    y = np.maximum(y.astype(np.int64), -1)
    if not 1 <= y.max() < max(num_nodes, 2):
        raise ValueError(f"{name}: labels reach {y.max()}; classes are 0, 1, ... and at least two of them")
    if masks is None:
        masks, more = _random_splits(y), {"note": "no published split: ten random ones, 50/25/25", **more}
    names = ("train", "val", "test")
    masks = [np.atleast_2d(_numbers(name, f"{part} mask", mask)) for part, mask in zip(names, masks)]
    if any(mask.shape != (len(masks[0]), num_nodes) for mask in masks):
        shapes = ", ".join(str(list(mask.shape)) for mask in masks)
        raise ValueError(f"{name}: masks are {shapes}; needed: [splits, {num_nodes}] each")
    masks = [mask.astype(bool) for mask in masks]
    for part, mask in zip(names, masks):
        if (bad := _first(~mask.any(axis=1))) is not None:
            raise ValueError(f"{name}: the {part} set of split {bad} is empty")
        if (bad := _first((mask & (y < 0)).any(axis=0))) is not None:
            raise ValueError(f"{name}: node {bad} is in a {part} set and has no label")
    if (bad := _first((np.sum(masks, axis=0) > 1).any(axis=0))) is not None:
        raise ValueError(f"{name}: node {bad} is in two of train, val and test of one split")
    edge_index = clean_edges(torch.from_numpy(edges.astype(np.int64)).T, num_nodes)
    tensors = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in masks]
    features = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return Graph(name, features, edge_index, torch.from_numpy(y), *tensors, num_classes=int(y.max()) + 1, **more)


def _numbers(name: str, what: str, value: object) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: {what} are of type {array.dtype}; plain numbers are needed")
    return array


def _first(wrong: np.ndarray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _random_splits(y: np.ndarray, num_splits: int = 10) -> list[np.ndarray]:
    masks = np.zeros((3, num_splits, len(y)), dtype=bool)
    labelled = np.flatnonzero(y >= 0)
    for i in range(num_splits):
        order = np.random.default_rng(i).permutation(labelled)
        for part, members in enumerate(np.split(order, [len(order) // 2, 3 * len(order) // 4])):
            masks[part, i, members] = True
    return list(masks)


# ---------------------------------------------------------------------------------------------------------------
# Operators: message passing as products with sparse matrices
# ---------------------------------------------------------------------------------------------------------------


class SparseProduct(torch.autograd.Function):
    """a @ x for a constant CSR matrix, whose transpose is stored too: autograd's own would build it at every step.

    In the precision of a, also under autocast: sparse products in bfloat16 do not exist everywhere.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, a_transposed: Tensor) -> Tensor:
        ctx.a_transposed = a_transposed
        with torch.autocast(x.device.type, enabled=False):
            return a @ x.to(a.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.a_transposed @ gradient, None, None


class Sparse:
    """A constant matrix from entries sorted by row, then column. `sparse @ x`: [rows, rows] @ [rows, width]."""

    def __init__(self, row: Tensor, column: Tensor, value: Tensor, size: int):
        self.csr = _csr(row, column, value, size)
        order = (column * size + row).argsort()
        symmetric = torch.equal(row[order], column) and torch.equal(value[order], value)
        self.transposed = self.csr if symmetric else _csr(column[order], row[order], value[order], size)

    def __matmul__(self, x: Tensor) -> Tensor:
        return SparseProduct.apply(x, self.csr, self.transposed)


def _csr(row: Tensor, column: Tensor, value: Tensor, size: int) -> Tensor:
    pointers = torch.zeros(size + 1, dtype=torch.int64, device=row.device)
    pointers[1:] = torch.bincount(row, minlength=size).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pointers, column, value, (size, size), check_invariants=True)


class Adjacency:
    """The operators of a graph, each built when first used. edge_index [2, edges] int64: sources, targets.

    Loops and duplicates are dropped; directions are kept. `degree` [nodes], incoming, is counted if not given.
    """

    def __init__(
        self, edge_index: Tensor, num_nodes: int, dtype: torch.dtype = torch.float32, degree: Tensor | None = None
    ):
        self.edge_index = clean_edges(edge_index, num_nodes, symmetric=False)
        self.num_nodes, self.dtype = num_nodes, dtype
        counted = torch.bincount(self.edge_index[1], minlength=num_nodes).to(dtype)
        self.degree = counted if degree is None else degree

    @cached_property
    def with_loops(self) -> Tensor:
        """edge_index with an edge from every node to itself, sorted by target."""
        nodes = torch.arange(self.num_nodes, device=self.edge_index.device)
        source, target = torch.cat([self.edge_index, nodes.expand(2, -1)], dim=1)
        order = (target * self.num_nodes + source).argsort()
        return torch.stack([source[order], target[order]])

    @cached_property
    def gcn(self) -> Sparse:
        """(D + I)^-1/2 (A + I) (D + I)^-1/2."""
        source, target = self.with_loops
        scale = (self.degree + 1).rsqrt()
        return Sparse(target, source, scale[source] * scale[target], self.num_nodes)

    @cached_property
    def mean(self) -> Sparse:
        """D^-1 A: the mean over neighbours, 0 without any."""
        source, target = self.edge_index
        return Sparse(target, source, 1 / self.degree[target], self.num_nodes)

    @cached_property
    def sum(self) -> Sparse:
        source, target = self.edge_index
        return Sparse(target, source, torch.ones(len(source), dtype=self.dtype, device=source.device), self.num_nodes)

    def reach(self, active: Tensor, hops: int) -> Tensor:
        """[nodes] bool: the nodes that `hops` layers must see to answer for the active ones [nodes] bool."""
        source, target = self.edge_index
        for _ in range(hops):
            seen = active.clone()
            seen[source[active[target]]] = True
            active = seen
        return active

    def restrict(self, keep: Tensor) -> "Adjacency":
        """The subgraph of keep [nodes] bool, with the degrees of the whole graph."""
        source, target = self.edge_index
        inside = keep[source] & keep[target]
        number = keep.cumsum(0) - 1
        edges = torch.stack([number[source[inside]], number[target[inside]]])
        return Adjacency(edges, int(keep.sum()), self.dtype, self.degree[keep])


# ---------------------------------------------------------------------------------------------------------------
# Generated graphs
# ---------------------------------------------------------------------------------------------------------------


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
    """A stochastic block model with two kinds of nodes, half of each, so that the right split of the work is known.

    mu_*         length of the class direction in the features, beside noise of variance 1 in each
    degree_*     mean degree; every node draws half of it as partners
    homophily_*  probability that a partner is of the favoured class; 1 / num_classes: neighbours say nothing
    cross        probability that a partner is of the other kind, of any class
    shift        the favoured class is the own one plus shift: 0 homophilous, 1 heterophilous
    Raises ValueError for impossible sizes and probabilities.
    """
    probabilities = {"homophily_rich": homophily_rich, "homophily_poor": homophily_poor, "cross": cross}
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; a probability is needed")
    if num_classes < 2 or num_features < num_classes or min(degree_rich, degree_poor) < 2 or mu_rich < 0 or mu_poor < 0:
        raise ValueError(
            f"num_classes is {num_classes}, num_features {num_features}, degrees {degree_rich} and {degree_poor}, "
            f"mu {mu_rich} and {mu_poor}; needed: 2 <= num_classes <= num_features, degrees >= 2, mu >= 0"
        )
    num_train, num_val = (round(share * num_nodes) for share in (train_share, val_share))
    if min(num_train, num_val, num_nodes - num_train - num_val) < num_classes:
        raise ValueError(
            f"{num_nodes} nodes with train_share {train_share} and val_share {val_share} leave a set smaller than "
            f"num_classes = {num_classes}"
        )
    rng = np.random.default_rng(seed)
    y, kind = rng.integers(num_classes, size=num_nodes), rng.random(num_nodes) < 0.5
    group = num_classes * kind + y
    members, counts = np.argsort(group, kind="stable"), np.bincount(group, minlength=2 * num_classes)
    if not counts.all():
        raise ValueError(f"{num_nodes} nodes are too few: a class of one kind has no member")
    directions = np.linalg.qr(rng.standard_normal((num_features, num_classes)))[0].T  # [classes, features]
    x = rng.standard_normal((num_nodes, num_features)) + np.where(kind, mu_rich, mu_poor)[:, None] * directions[y]

    source = np.repeat(np.arange(num_nodes), np.where(kind, degree_rich // 2, degree_poor // 2))
    own_kind, own_class = kind[source], y[source]
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
    for part, nodes in enumerate(np.split(rng.permutation(num_nodes), [num_train, num_train + num_val])):
        masks[part, nodes] = True
    edges = np.stack([source, target], axis=1)
    return build_graph(f"generated graph {seed}", x, edges, y, masks, kind=torch.from_numpy(kind))


def stand_in(name: str) -> Graph:
    """A random graph of the size of a public one, to see what a run would cost before anything is downloaded."""
    num_nodes, num_edges, num_features, num_classes = SIZES[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_nodes, num_features), dtype=np.float32)
    edges, y = rng.integers(num_nodes, size=(num_edges, 2)), rng.integers(num_classes, size=num_nodes)
    y[0] = num_classes - 1
    return build_graph(f"random graph of the size of {name}", x, edges, y)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def load(name: str | Path, data_dir: str | Path | None = None) -> Graph:
    """A public graph by name, or your own: an .npz file, or a folder in the layout of OGB, Flickr or twitch-gamer.

    Raises ValueError for a damaged or unknown file, FileNotFoundError with what to put where for what cannot be
    downloaded, download.DownloadError when a download fails.
    """
    path = Path(name).expanduser()
    if str(name) not in SIZES:
        if not path.exists():
            raise ValueError(f"dataset {str(name)!r} is neither a file or folder nor one of {', '.join(SIZES)}")
        return read_npz(path) if path.is_file() else _read_folder(path)
    name = str(name)
    folder = _by_hand(name, data_dir) if name in BY_HAND else download.fetch(name, data_dir)
    readers = {
        "flickr": lambda: read_flickr(folder),
        "ogbn-arxiv": lambda: read_ogb(folder / "arxiv", "time"),
        "ogbn-products": lambda: read_ogb(folder / "products", "sales_ranking"),
        "twitch-gamer": lambda: read_twitch(folder),
        "penn94": lambda: read_facebook(folder / "Penn94.mat", folder / "fb100-Penn94-splits.npy"),
        "pokec": lambda: read_pokec(folder / "pokec.mat", folder / "pokec-splits.npy"),
    }
    return readers.get(name, lambda: read_npz(folder / f"{name}.npz"))()._replace(name=name)


def is_here(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether load(name) would find its files without a download (a path: always)."""
    folder = _root(data_dir) / name
    files = BY_HAND[name][0] if name in BY_HAND else (download.MARKER,)
    return name not in SIZES or all((folder / file).is_file() for file in files)


def download_size(name: str) -> int | None:
    """Bytes that load(name) would download; 0 for what is put there by hand, None if its publisher does not say."""
    return 0 if name in BY_HAND else download.DATASETS[name].size


def _root(data_dir: str | Path | None) -> Path:
    return Path(data_dir or os.environ.get("MOE_DATA") or Path(__file__).resolve().parent / "cache").expanduser()


def _by_hand(name: str, data_dir: str | Path | None) -> Path:
    files, source = BY_HAND[name]
    folder = _root(data_dir) / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name} has no direct address: get {', '.join(missing)} from {source}, put into {folder}"
        )
    return folder


def _read_folder(folder: Path) -> Graph:
    if (folder / "adj_full.npz").exists():
        return read_flickr(folder)
    if (folder / "large_twitch_edges.csv").exists() or (folder / "twitch_gamers").exists():
        return read_twitch(folder)
    splits = sorted(path.name for path in (folder / "split").glob("*") if path.is_dir())
    if (folder / "raw").is_dir() and splits:
        return read_ogb(folder, splits[0])
    raise ValueError(
        f"{folder} holds no graph: needed are raw/ and split/ (OGB), adj_full.npz, or large_twitch_edges.csv"
    )


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, without pickle. Raises ValueError with the file's name for anything damaged."""
    try:
        if path.exists() and not zipfile.is_zipfile(path):  # np.load would take it for a pickle
            raise ValueError("no zip archive of arrays")
        if path.exists():
            with zipfile.ZipFile(path) as archive:
                packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
            if (size := sum(member.file_size for member in packed)) > MOST_BYTES:
                raise ValueError(f"its arrays unpack to {size:,} bytes, more than {MOST_BYTES:,}; use np.savez")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip can fail in any way
        objects = "Object arrays" in str(error)
        reason = "it holds Python objects, and nothing is unpickled" if objects else f"not a readable .npz ({error})"
        raise ValueError(f"{path}: {reason}") from error


def read_npz(path: str | Path) -> Graph:
    """node_features, node_labels, edges, and {train,val,test}_masks if there are: the heterophilous-graphs format."""
    arrays = _load_npz(Path(path))
    missing = [name for name in ("node_features", "node_labels", "edges") if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    names = [f"{part}_masks" if f"{part}_masks" in arrays else f"{part}_mask" for part in ("train", "val", "test")]
    found = [name for name in names if name in arrays]
    if found and len(found) < 3:
        raise ValueError(f"{path} has only {', '.join(found)}; give masks for train, val and test, or none")
    masks = [arrays[name] for name in names] if found else None
    return build_graph(str(path), arrays["node_features"], arrays["edges"], arrays["node_labels"], masks)


def _table(path: Path, dtype: type, **options: object) -> np.ndarray:
    """A csv file (or .csv.gz) without header. [rows, columns]; ValueError names file and row."""
    try:
        return np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2, **options)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


def _member_masks(name: str, num_nodes: int, splits: list[dict[str, object]]) -> list[np.ndarray]:
    """Lists of node numbers into masks: [{"train": ..., "valid": ..., "test": ...}] -> three of [splits, nodes]."""
    masks = np.zeros((3, len(splits), num_nodes), dtype=bool)
    for i, split in enumerate(splits):
        for part, key in enumerate(("train", "valid", "test")):
            members = np.asarray(split[key], dtype=np.int64).ravel()
            if (bad := _first((members < 0) | (members >= num_nodes))) is not None:
                raise ValueError(f"{name}: {key} set, entry {bad}: node {members[bad]} of {num_nodes}")
            masks[part, i, members] = True
    return list(masks)


def read_ogb(folder: str | Path, split: str) -> Graph:
    """raw/{edge,node-feat,node-label}.csv.gz and split/<split>/{train,valid,test}.csv.gz, as OGB packs them.

    Parsing takes minutes, so the result is kept as parsed.npz in the folder, and used while it is the newest file.
    """
    folder = Path(folder)
    raw = [folder / "raw" / f"{part}.csv.gz" for part in ("node-feat", "edge", "node-label")]
    parts = [folder / "split" / split / f"{part}.csv.gz" for part in ("train", "valid", "test")]
    for path in (*raw, *parts):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
    cache, newest = folder / "parsed.npz", max(path.stat().st_mtime for path in (*raw, *parts))
    if cache.exists() and cache.stat().st_mtime >= newest:
        arrays = _load_npz(cache)
    else:
        print(f"reading {folder} (once; minutes for a large graph)", file=sys.stderr)
        arrays = {"x": _table(raw[0], np.float32), "edges": _table(raw[1], np.int64), "y": _table(raw[2], np.float64)}
        arrays |= {path.name.split(".")[0]: _table(path, np.int64) for path in parts}
        temporary = cache.with_name(f".parsed.{os.getpid()}.npz")
        try:
            np.savez(temporary, **arrays)
            os.replace(temporary, cache)
        except OSError as error:  # a read-only folder is no reason to stop
            print(f"{cache} could not be written ({error}); the files are parsed again next time", file=sys.stderr)
        finally:
            temporary.unlink(missing_ok=True)
    masks = _member_masks(str(folder), len(arrays["x"]), [arrays])
    return build_graph(str(folder), arrays["x"], arrays["edges"], arrays["y"].ravel(), masks)


def read_flickr(folder: str | Path) -> Graph:
    """adj_full.npz (a CSR matrix), feats.npy, class_map.json, role.json: the files of GraphSAINT."""
    folder = Path(folder)
    adjacency = _load_npz(folder / "adj_full.npz")
    try:
        pointers, target = adjacency["indptr"].astype(np.int64), adjacency["indices"]
        source = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
        x = np.load(folder / "feats.npy", allow_pickle=False)
        classes = json.loads((folder / "class_map.json").read_text())
        role = json.loads((folder / "role.json").read_text())
        y, splits = [classes[str(node)] for node in range(len(x))], {k: role[v] for k, v in ROLES.items()}
        edges = np.stack([source, target], axis=1)
    except FileNotFoundError:
        raise
    except (LookupError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{folder} is not in the layout of GraphSAINT's Flickr ({error!r})") from error
    return build_graph(str(folder), x, edges, y, _member_masks(str(folder), len(x), [splits]))


ROLES = {"train": "tr", "valid": "va", "test": "te"}


def read_twitch(folder: str | Path) -> Graph:
    """large_twitch_{edges,features}.csv of SNAP; label: mature. With the five LINKX splits if they lie there."""
    folder = Path(folder)
    root = folder / "twitch_gamers" if (folder / "twitch_gamers").is_dir() else folder
    path = root / "large_twitch_features.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("views", "life_time", "created_at", "updated_at", "dead_account", "language", "affiliate")
    if not rows or set(rows[0]) != {*columns, "numeric_id", "mature"}:
        raise ValueError(f"{path}: the columns are {', '.join(rows[0]) if rows else 'missing'}")
    languages = {name: i for i, name in enumerate(dict.fromkeys(row["language"] for row in rows))}
    x, y = np.empty((len(rows), len(columns))), np.empty(len(rows), dtype=np.int64)
    for number, row in enumerate(rows):
        try:
            node = int(row["numeric_id"])
            if node != number:
                raise ValueError(f"node {node}, where {number} is expected")
            values = {**row, "language": languages[row["language"]]}
            x[number] = [float(str(values[column]).replace("-", "")) for column in columns]
            y[number] = int(row["mature"])
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number + 2}: {error}") from error
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0, ddof=1), 1e-12)  # float64: dates are 2e7
    edges = _table(root / "large_twitch_edges.csv", np.int64, skiprows=1)
    splits = folder / "twitch-gamer-splits.npy"
    return build_graph(str(folder), x, edges, y, read_linkx_splits(splits, len(x)) if splits.exists() else None)


def _loadmat(path: Path) -> dict:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{path}: reading .mat needs SciPy: pip install -r requirements-full.txt") from None
    try:
        return loadmat(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} is not a readable .mat file ({error})") from error


def read_facebook(path: str | Path, splits: str | Path | None = None) -> Graph:
    """A facebook100 .mat: label gender (0: unlabelled), features the other six columns of local_info, one-hot."""
    found = _loadmat(Path(path))
    try:
        adjacency, info = found["A"].tocoo(), np.asarray(found["local_info"]).astype(np.int64)
        other = [info[:, column] for column in range(info.shape[1]) if column != 1]
        x = np.concatenate([column[:, None] == np.unique(column) for column in other], axis=1)
        edges, y = np.stack([adjacency.row, adjacency.col], axis=1), info[:, 1] - 1
    except (LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a facebook100 file ({error!r})") from error
    return build_graph(str(path), x, edges, y, read_linkx_splits(splits, len(x)) if splits else None)


def read_pokec(path: str | Path, splits: str | Path | None = None) -> Graph:
    """pokec.mat of LINKX: edge_index [2, edges], node_feat, label."""
    found = _loadmat(Path(path))
    try:
        edges, x, y = found["edge_index"].T, found["node_feat"], found["label"].ravel()
    except (LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not LINKX's pokec.mat ({error!r})") from error
    return build_graph(str(path), x, edges, y, read_linkx_splits(splits, len(x)) if splits else None)


def read_linkx_splits(path: str | Path, num_nodes: int) -> list[np.ndarray]:
    """LINKX's *-splits.npy: a pickled array of dicts {"train", "valid", "test"} of node numbers, read as plain data."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            read_header[version](file)
            splits = plain_pickle(file.read())
        return _member_masks(str(path), num_nodes, [dict(split) for split in splits])
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} is not a file of splits ({error})") from error


ARRAY_NAMES = {
    f"{module} {name}"
    for module, name in [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
}
PLAIN = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE"}
PLAIN |= {"SHORT_BINBYTES", "BINBYTES", "SHORT_BINSTRING", "BINSTRING", "STRING"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}


def plain_pickle(content: bytes) -> object:
    """Lists, dicts, whole numbers and strings out of a pickle, by reading its opcodes: nothing is imported or called.

    An array of objects comes out as the list of its elements. Raises ValueError for any other name or opcode.
    """
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in PLAIN:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(since_mark()))
        elif name == "DICT":
            items = since_mark()
            stack.append(dict(zip(items[::2], items[1::2])))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = argument if name == "GLOBAL" else " ".join(map(str, (stack.pop(-2), stack.pop())))
            if wanted not in ARRAY_NAMES:
                raise ValueError(f"it asks for {wanted.replace(' ', '.')}, which is not plain data")
            stack.append(wanted)
        elif name == "REDUCE":  # a call, of which only an array's own is known: an empty list stands for its result
            stack[-2:] = [[]]
        elif name == "BUILD":  # the state of an array: (version, shape, dtype, order, elements)
            state = stack.pop()
            if len(state) == 5 and isinstance(state[4], list):
                stack[-1].extend(state[4])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"opcode {name} is not plain data")
    return stack.pop()
