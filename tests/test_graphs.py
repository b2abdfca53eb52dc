"""Graphs: generated with the promised statistics, read with checks, and nothing is executed."""

import gzip
import json
import os
import pickle

import numpy as np
import pytest
import torch

from data import download, graphs


def homophily(graph, of=None):
    """Share of edges that join equal labels, of all edges or of those into the nodes `of`."""
    source, target = graph.edge_index
    same = graph.y[source] == graph.y[target]
    return float((same if of is None else same[of[target]]).float().mean())


def test_generated_graph_has_the_promised_statistics():
    graph = graphs.contextual_sbm(0)
    assert homophily(graph, graph.kind) == pytest.approx(0.20, abs=0.03)
    assert homophily(graph, ~graph.kind) == pytest.approx(0.81, abs=0.03)
    assert graph.edge_index.shape[1] == pytest.approx(53_300, rel=0.02)
    source, target = graph.edge_index
    pairs = set(zip(source.tolist(), target.tolist()))
    assert len(pairs) == len(source) and not (source == target).any()
    assert all((b, a) in pairs for a, b in pairs)
    masks = torch.stack([graph.train_mask, graph.val_mask, graph.test_mask])
    assert (masks.sum(0) == 1).all() and masks.sum((1, 2)).tolist() == [300, 600, 2100]
    energy = graph.x[graph.kind].square().sum(1).mean()
    assert energy == pytest.approx(16 + 16, rel=0.05)  # noise 16, signal 4 squared


def test_generated_graph_follows_its_seed_and_its_knobs():
    one, same, other = (graphs.contextual_sbm(seed, num_nodes=400) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    shifted = graphs.contextual_sbm(0, shift=1, cross=0.0)
    source, target = shifted.edge_index
    poor = ~shifted.kind[target] & ~shifted.kind[source]
    difference = (shifted.y[source] - shifted.y[target])[poor] % 5
    assert (difference == 0).float().mean() < 0.1
    assert ((difference == 1) | (difference == 4)).float().mean() > 0.8
    crossed = graphs.contextual_sbm(0, cross=1.0)
    assert (crossed.kind[crossed.edge_index[0]] != crossed.kind[crossed.edge_index[1]]).all()


X, Y, EDGES = np.eye(4), np.array([0, 1, 0, 1]), np.array([[0, 1], [1, 2], [2, 3], [1, 0], [3, 3]])
MASKS = [np.array([row], bool) for row in ([1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])]
REFERENCE = graphs.build_graph("g", X, EDGES, Y, MASKS)


def same(one, other):
    names = ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_edges_are_made_symmetric_and_cleaned():
    assert REFERENCE.edge_index.tolist() == [[1, 0, 2, 1, 3, 2], [0, 1, 1, 2, 2, 3]]
    assert REFERENCE.x.dtype == torch.float32
    assert REFERENCE.num_classes == 2 and REFERENCE.num_splits == 1
    assert REFERENCE.split(0).train_mask.tolist() == [True, True, False, False]


def test_unlabelled_nodes_enter_no_split():
    y = np.where(np.arange(60) % 3 == 0, -1, np.arange(60) % 2)
    for labels in (y, np.where(y < 0, np.nan, y)):
        graph = graphs.build_graph("g", np.eye(60), EDGES, labels)
        used = graph.train_mask | graph.val_mask | graph.test_mask
        assert torch.equal(used, (graph.y >= 0).expand(10, 60)) and "random" in graph.note


LABELS = [
    ([1, 5, 1, 5], [0, 1, 0, 1], "labels have gaps: the 2 classes 1 .. 5 are numbered 0 .. 1"),
    ([0, 30, 10, -1], [0, 2, 1, -1], "the 3 classes 0 .. 30 are numbered 0 .. 2"),
    (["dog", "cat", "dog", "eel"], [1, 0, 1, 2], "labels are text: the 3 classes cat .. eel"),
    ([0.0, 1.0, np.nan, 1.0], [0, 1, -1, 1], ""),
]


@pytest.mark.parametrize("labels, expected, told", LABELS)
def test_labels_are_numbered_without_gaps_and_a_line_says_so(capsys, labels, expected, told):
    graph = graphs.build_graph(f"graph of {labels}", np.eye(16), EDGES, np.array(labels * 4))
    assert graph.y.tolist() == expected * 4 and graph.num_classes == max(expected) + 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == bool(told)


def save_npz(path, **changes):
    masks = {f"{part}_masks": mask for part, mask in zip(("train", "val", "test"), MASKS)}
    arrays = {"node_features": X, "node_labels": Y, "edges": EDGES, **masks, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


REFUSED = [  # changed arrays, what is said
    ({"edges": np.array([[0, 1], [2, 4]])}, r"edge in row 1 joins \[2, 4\]; .* nodes 0 .. 3"),
    ({"edges": np.array([[0.5, 1]])}, r"edge in row 0 joins \[0.5, 1.0\]; there are nodes"),
    ({"edge_weights": np.ones(5)}, "holds edge_weights, which no method here uses"),
    ({"node_features": np.where(np.eye(4) > 0, np.nan, 1.0)}, "features of node 0 hold NaN"),
    ({"node_features": np.arange(4)[:, None] + 1_700_000_000}, "column 0 loses digits in float32"),
    ({"node_labels": np.array([0, -1, 0, 1])}, "node 1 is in a train set and has no label"),
    ({"node_labels": np.array([0, 0.5, 0, 1])}, "label of node 1 is 0.5"),
    ({"val_masks": None}, "has only a part of a split; give train, val and test"),
    ({"val_masks": MASKS[0]}, "node 0 is in two"),
    ({"train_masks": np.array([[0, 1, 1, 3]])}, "node 3 hold neither .* belong into train_idx"),
    ({"edges": np.array([{"a": 1}], dtype=object)}, "Python objects, and nothing is unpickled"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_would_be_wrong_ignored_or_changed_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"g.npz(: |, array).*{message}"):
        graphs.load(save_npz(tmp_path / "g.npz", **changes))


def test_npz_round_trip(tmp_path):
    path = save_npz(tmp_path / "g.npz")
    assert same(graphs.load(path), REFERENCE) and graphs.load(path).name == str(path)
    without = save_npz(tmp_path / "h.npz", train_masks=None, val_masks=None, test_masks=None)
    assert graphs.load(without).num_splits == 10


def test_arrays_of_pytorch_geometric(tmp_path):
    """Every way to say the same graph gives the same graph."""

    def loaded(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return graphs.load(tmp_path / f"{name}.npz")

    plain = {"x": X, "y": Y, "edge_index": EDGES.T}
    masks = dict(zip(("train_mask", "val_mask", "test_mask"), MASKS))
    ways = {
        "masks": {name: mask[0] for name, mask in masks.items()},
        "columns": {name: mask.T for name, mask in masks.items()},  # [nodes, splits]
        "members": {"train_idx": [0, 1], "valid_idx": [2], "test_idx": [3]},
        "index": {"train_index": [[0, 1]], "val_index": [[2]], "test_index": [[3]]},
    }
    for name, split in ways.items():
        assert same(loaded(name, **plain, **split), REFERENCE), name
    assert same(graphs.load(save_npz(tmp_path / "turned.npz", edges=EDGES.T)), REFERENCE)
    # two edges: a square, whose name says which way round
    for name, edges in (("edges", [[0, 1], [2, 3]]), ("edge_index", [[0, 2], [1, 3]])):
        found = loaded(name, x=X, y=Y, **masks, **{name: np.array(edges)})
        assert found.edge_index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]], name


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(",".join(map(str, np.atleast_1d(row))) + "\n" for row in rows)


def ogb_folder(root):
    for name, rows in (("node-feat", X), ("edge", EDGES), ("node-label", Y)):
        write_csv(root / "raw" / f"{name}.csv.gz", rows)
    for name, mask in zip(("train", "valid", "test"), MASKS):
        write_csv(root / "split" / "time" / f"{name}.csv.gz", np.flatnonzero(mask))
    return root


def test_ogb_folder_and_its_cache(tmp_path):
    folder = ogb_folder(tmp_path / "arxiv")
    assert same(graphs.load(folder), REFERENCE)
    # Another file with an older time stamp: the old edges would be wrong.
    edges = folder / "raw" / "edge.csv.gz"
    write_csv(edges, [[0, 1], [1, 2], [2, 0], [1, 0], [3, 3]])
    os.utime(edges, (0, 0))
    assert not same(graphs.load(folder), REFERENCE)


def write_flickr(folder, **changes):
    """REFERENCE in the files of GraphSAINT."""
    folder.mkdir(exist_ok=True)
    target, pointers = [1, 0, 2, 1, 3, 2], [0, 1, 3, 5, 6]
    arrays = {"data": np.ones(6), "indices": np.array(target), "indptr": np.array(pointers)}
    np.savez(folder / "adj_full.npz", **{**arrays, "shape": np.array([4, 4]), **changes})
    np.save(folder / "feats.npy", X)
    classes = {str(i): int(label) for i, label in enumerate(Y)}
    (folder / "class_map.json").write_text(json.dumps(classes))
    (folder / "role.json").write_text(json.dumps({"tr": [0, 1], "va": [2], "te": [3]}))
    return folder


def test_flickr_files(tmp_path):
    assert same(graphs.load(write_flickr(tmp_path)), REFERENCE)
    (tmp_path / "role.json").write_text('{"tr": [0, 1.9], "va": [2], "te": [3]}')
    with pytest.raises(ValueError, match="train set, entry 1 is 1.9"):
        graphs.load(tmp_path)
    write_flickr(tmp_path, data=np.full(6, 0.5))
    with pytest.raises(ValueError, match="edge weights other than 1"):
        graphs.load(tmp_path)


TWITCH = """views,mature,life_time,created_at,updated_at,numeric_id,dead_account,language,affiliate
10,1,5,2015-03-01,2018-10-12,0,0,EN,1
20,0,6,2016-03-01,2018-10-12,1,0,DE,1
30,1,7,2017-03-01,2018-10-12,2,0,EN,0
40,0,8,2018-03-01,2018-10-12,3,0,FR,0
"""


def test_twitch_files(tmp_path):
    root = tmp_path / "twitch_gamers"
    root.mkdir()
    (root / "large_twitch_features.csv").write_text(TWITCH)
    (root / "large_twitch_edges.csv").write_text("numeric_id_1,numeric_id_2\n0,1\n1,2\n2,3\n")
    save_splits(tmp_path / "twitch-gamer-splits.npy", [([0, 1], [2], [3])])
    graph = graphs.load(tmp_path)
    assert graph.x.shape == (4, 7) and graph.y.tolist() == [1, 0, 1, 0]
    assert torch.equal(graph.edge_index, REFERENCE.edge_index)
    assert torch.equal(graph.train_mask, REFERENCE.train_mask)
    torch.testing.assert_close(graph.x.mean(0), torch.zeros(7), atol=1e-6, rtol=0)
    varied = [0, 1, 2, 5, 6]  # updated_at and dead_account are constant
    torch.testing.assert_close(graph.x.std(0)[varied], torch.ones(5))
    languages = graph.x[:, 5]
    assert languages[0] == languages[2] and len(set(languages.tolist())) == 3


def save_splits(path, splits, protocol=4):
    array = np.empty(len(splits), dtype=object)
    for i, (train, valid, test) in enumerate(splits):
        array[i] = {"train": train, "valid": valid, "test": test}
    with open(path, "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(array, file, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_splits_are_read_without_unpickling(tmp_path, protocol):
    path, many = tmp_path / "s.npy", list(range(2, 70_000, 7))
    save_splits(path, [([0, 1], [300], many), ([2], [1], [0])], protocol)
    train, val, test = graphs.read_linkx_splits(path, 70_000)
    assert train.sum(1).tolist() == [2, 1] and np.flatnonzero(val[0]).tolist() == [300]
    assert np.flatnonzero(test[0]).tolist() == many


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("protocol", [0, 4])
def test_hostile_splits_are_refused_and_nothing_runs(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    save_splits(tmp_path / "s.npy", [([0], Evil(), [1])], protocol)
    with pytest.raises(ValueError, match="s.npy: .*asks for posix.system"):
        graphs.read_linkx_splits(tmp_path / "s.npy", 4)
    assert not (tmp_path / "owned").exists()


def test_mat_files(tmp_path):
    io = pytest.importorskip("scipy.io")
    sparse = pytest.importorskip("scipy.sparse")
    school, pokec, splits = (tmp_path / name for name in ("P.mat", "k.mat", "s.npy"))
    adjacency = np.zeros((4, 4))
    adjacency[tuple(REFERENCE.edge_index.numpy())] = 1
    genders = [1, 2, 0, 2]  # node 2 has no known one
    info = [[kind, gender, 3 * kind, 7, 5, 2, 9] for kind, gender in zip([1, 1, 2, 2], genders)]
    io.savemat(school, {"A": sparse.csc_matrix(adjacency), "local_info": np.array(info)})
    save_splits(splits, [([0], [1], [3])])
    graph = graphs.read_facebook(school, splits)
    assert torch.equal(graph.edge_index, REFERENCE.edge_index) and graph.y.tolist() == [0, 1, -1, 1]
    assert graph.x.shape == (4, 2 + 2 + 1 + 1 + 1 + 1) and graph.x.sum(1).tolist() == [6.0] * 4
    io.savemat(pokec, {"edge_index": EDGES.T, "node_feat": X, "label": Y[None], "num_nodes": 4})
    save_splits(splits, [([0, 1], [2], [3])])
    assert same(graphs.read_pokec(pokec, splits), REFERENCE)


def test_every_name_is_downloadable_or_says_where_it_goes(tmp_path):
    for name in graphs.SIZES:
        assert (name in download.DATASETS) != (name in graphs.BY_HAND)
    for name, (files, _) in graphs.BY_HAND.items():
        with pytest.raises(FileNotFoundError, match=f"get {files[0]}.*put into .*{name}"):
            graphs.load(name, tmp_path)
        assert not graphs.is_here(name, tmp_path) and graphs.download_size(name) == 0
    assert graphs.download_size("tolokers") == 1_329_769
