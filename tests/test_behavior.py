"""data/behavior.py: metrics against pairs counted one by one, readers on small files."""

import csv
import gzip
from itertools import permutations

import numpy as np
import pytest
import torch

from data import behavior
from data.behavior import expected_auc


def by_pairs(scores, truth):
    """Every ordered pair of different rows: the first positive with p, the second negative."""
    won = pairs = 0.0
    for i, j in permutations(range(len(scores)), 2):
        weight = truth[i] * (1 - truth[j])
        pairs += weight
        won += weight * (float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]))
    return won / pairs if pairs else np.nan


def by_pairs_of_users(scores, truth, users):
    """The mean over the users that have a pair, weighted by their rows."""
    total = weight = 0
    for user in set(users):
        mine = users == user
        value = by_pairs(scores[mine], truth[mine])
        if not np.isnan(value):
            total += mine.sum() * value
            weight += mine.sum()
    return total / weight if weight else np.nan


def test_worked_examples_of_auc_and_gauc():
    assert expected_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert expected_auc([0.5, 0.5, 0.5, 0.9], [0, 1, 0, 1]) == 0.75  # ties count a half
    assert expected_auc([0.1, 0.2, 0.3], [0.1, 0.5, 0.3]) == pytest.approx(0.6492537313, abs=1e-9)
    for scores, labels in (([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 0]), ([], []), ([0.3], [0.4])):
        assert np.isnan(expected_auc(scores, labels))  # one class is no exception
    assert np.isnan(expected_auc([1, 2], [1, 0], [7, 8]))
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        expected_auc([0.1, np.nan], [0, 1])
    scores, labels = [0.1, 0.4, 0.35, 0.8, 0.9, 0.2, 0.3], [0, 0, 1, 1, 0, 1, 1]
    assert expected_auc(scores, labels, [5, 5, 5, 5, 9, 9, 2]) == 0.5  # (0.75 * 4 + 0 * 2) / 6


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 7, 30])
def test_metrics_equal_counting_pairs(rows, soft):
    rng = np.random.default_rng(1)
    scores = rng.integers(5, size=rows) / 4  # many ties
    truth = rng.random(rows) if soft else rng.integers(2, size=rows).astype(float)
    users = rng.integers(3, size=rows)
    expected = [by_pairs(scores, truth), by_pairs_of_users(scores, truth, users)]
    found = [expected_auc(scores, truth), expected_auc(scores, truth, users)]
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_ranking_leaves_constant_tasks_out_of_the_mean():
    labels = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])
    part = behavior.Part(torch.zeros(4, 1), labels, torch.zeros(4))
    found = behavior.ranking(np.array([[0.1, 1], [0.4, 2], [0.35, 3], [0.8, 4]]), part, [0])
    assert found["auc"] == [0.75, None] and found["mean_auc"] == 0.75 and found["mean_gauc"] == 0.75


def test_the_generated_log_has_the_rates_and_the_groups_that_it_promises():
    data = behavior.synthetic(3, rows=40_000)
    again, other = (behavior.synthetic(seed, rows=40_000).digest for seed in (3, 4))
    assert again == data.digest != other
    rates = data.train.truth.double().mean(dim=0)
    assert rates.tolist() == pytest.approx(list(behavior.RATES.values()), rel=0.06)
    assert data.train.labels.double().mean(dim=0).tolist() == pytest.approx(rates.tolist(), rel=0.2)
    assert data.tasks == tuple(behavior.RATES) and len(data.test.labels) == 8000
    assert behavior.rare_and_frequent(data) == ([5, 6, 7], [0, 1, 2])
    # Duration raises every watch task and lowers every interaction.
    duration = data.train.ids[:, list(data.fields).index("duration")].double()
    logits = data.train.truth.double().logit().T
    slope = [float(torch.corrcoef(torch.stack([duration, row]))[0, 1]) for row in logits]
    assert min(slope[:3]) > 0.15 and max(slope[3:]) < -0.15


def test_batches_are_a_function_of_the_step_and_take_each_row_once_an_epoch():
    rows = torch.arange(11)
    part = behavior.Part(rows[:, None], rows[:, None] % 2, rows, rows[:, None] / 11)

    def taken(seed, steps):
        batches = behavior.batch_maker(part, 3, seed)
        return [batches(step).ids[:, 0].tolist() for step in steps]

    first, second = taken(5, range(3)), taken(5, range(3, 6))
    for epoch in (first, second):  # two of the eleven are left out
        assert [len(batch) for batch in epoch] == [3, 3, 3] and len({*sum(epoch, [])}) == 9
    assert taken(5, [4, 1]) == [second[1], first[1]]  # in any order
    assert first != second and taken(6, range(3)) != first
    batch = behavior.batch_maker(part, 3, 5)(2)
    assert torch.equal(batch.labels, batch.ids % 2) and batch.users is batch.truth is None


# --- KuaiRand -------------------------------------------------------------------------------------

LOG = (*behavior.LOG_COLUMNS, *behavior.LOG_SPARE)
USER = ("user_id", *behavior.USER_COLUMNS, *behavior.USER_SPARE)
VIDEO = ["video_id", *behavior.VIDEO_HASHED, *behavior.VIDEO_COLUMNS, *behavior.VIDEO_SPARE]


def a_user(number):
    row = dict.fromkeys(USER, 0) | {"user_id": 10 + number, "register_days_range": "31-60"}
    row["is_live_streamer"] = [-124, 0, 1][number % 3]
    return row | {f"onehot_feat{i}": ["", 0.0, 1.0][(number + i) % 3] for i in range(18)}


def a_video(number):
    row = dict.fromkeys(VIDEO, 1.0) | {"video_id": number, "author_id": 1000 + number // 3}
    row["tag"] = ["12,65", "8", "", "12"][number % 4]
    return row


def an_exposure(rng):
    row = dict.fromkeys(LOG, 0)
    row["user_id"], row["video_id"] = 10 + rng.integers(12), rng.integers(40)
    day = rng.integers(8, 39)  # 8 April to 8 May
    row["date"] = 20220400 + day if day <= 30 else 20220500 + day - 30
    row["hourmin"] = 100 * rng.integers(24) + 30
    row["play_time_ms"], row["duration_ms"] = rng.integers(20_000), rng.integers(1000, 20_000)
    row |= {name: int(rng.random() < 0.4) for name in behavior.LABELS.values()}
    row["tab"] = rng.integers(15)
    return row


def write_kuairand(root, version="1k", rows=300, change=lambda kind, row, i: row):
    """The four files as published, random but for what a test changes: change(kind, row, i)."""
    rng = np.random.default_rng(0)
    published = {"1k": "KuaiRand-1K", "pure": "KuaiRand-Pure"}[version]
    folder = root / f"kuairand-{version}" / published / "data"
    folder.mkdir(parents=True)
    log = sorted((an_exposure(rng) for _ in range(rows)), key=lambda row: row["date"])
    early = [row for row in log if row["date"] <= 20220421]
    files = {
        f"log_standard_4_08_to_4_21_{version}": (LOG, early, "log"),
        f"log_standard_4_22_to_5_08_{version}": (LOG, log[len(early) :], "log"),
        f"user_features_{version}": (USER, [a_user(i) for i in reversed(range(12))], "user"),
        f"video_features_basic_{version}": (VIDEO, [a_video(i) for i in range(40)], "video"),
    }
    for stem, (columns, content, kind) in files.items():
        with open(folder / f"{stem}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(change(kind, row, i) for i, row in enumerate(content))
    return folder


def load(root, name="kuairand-1k", hash_bits=10):
    return behavior.load(name, root, hash_bits=hash_bits)


def all_rows(data):
    parts = (data.train, data.val, data.test)
    return [np.concatenate([getattr(part, kind) for part in parts]) for kind in behavior.ARRAYS]


def test_kuairand_from_both_logs_split_by_date(tmp_path, monkeypatch):
    monkeypatch.setattr(behavior, "CHUNK", 16)  # rows parsed at a time
    folder = write_kuairand(tmp_path)
    data = load(tmp_path)
    logs = [folder / f"log_standard_{days}_1k.csv" for days in ("4_08_to_4_21", "4_22_to_5_08")]
    flat = [row for log in logs for row in csv.DictReader(open(log))]  # by date
    number = lambda column: [int(row[column]) for row in flat]
    dates = np.array(number("date"))
    sizes = [(dates < 20220507).sum(), (dates == 20220507).sum(), (dates == 20220508).sum()]
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == sizes
    ids, labels, users = all_rows(data)
    assert users.tolist() == number("user_id")
    columns = "is_click long_view is_like is_profile_enter is_comment is_forward is_follow".split()
    tasks = "effective_view long_view like profile comment forward follow".split()
    for task, column in zip(tasks, columns):
        assert labels[:, data.tasks.index(task)].tolist() == number(column), task
    play, duration = np.array(number("play_time_ms")), np.array(number("duration_ms"))
    assert labels[:, 2].tolist() == (play >= duration).tolist()  # finish

    column = {name: values.tolist() for name, values in zip(data.fields, ids.T)}
    assert column["tab"] == [1 + tab for tab in number("tab")]
    assert column["hour"] == [time // 100 for time in number("hourmin")]
    assert column["duration"] == (1 + np.log2(duration).astype(int)).tolist()
    assert column["user_id"] == [1 + user - 10 for user in number("user_id")]
    unknown = [(user - 10) % 3 == 0 for user in number("user_id")]  # -124, or an empty cell
    for name in ("is_live_streamer", "onehot_feat0"):
        assert [value == 0 for value in column[name]] == unknown
    videos = number("video_id")
    tags = {(video % 4, tag) for video, tag in zip(videos, column["tag"])}
    assert tags == {(0, 1), (1, 2), (2, 0), (3, 1)}  # "12,65" counts as 12; an empty cell is id 0
    authors = {(video // 3, author) for video, author in zip(videos, column["author_id"])}
    assert len(authors) == len({*column["author_id"]}) == 14  # an id of its own for each author


def test_kuairand_reads_no_statistics_and_nothing_after_the_exposure(tmp_path):
    later = {"profile_stay_time": 7, "comment_stay_time": 7, "is_hate": 1}

    def change(kind, row, i):
        return row | later | {"play_time_ms": 7 + 10**5 * (i % 2)} if kind == "log" else row

    write_kuairand(tmp_path)
    write_kuairand(tmp_path / "other", change=change)
    before, changed = load(tmp_path), load(tmp_path / "other")
    assert np.array_equal(all_rows(before)[0], all_rows(changed)[0])  # only `finish` differs
    assert not {*before.fields} & {"play_time_ms", *later, *behavior.LABELS.values()}


def test_kuairand_pure_empty_cells_and_unknown_ids(tmp_path):
    def change(kind, row, i):
        if kind == "log" and i % 50 == 0:
            row |= {"duration_ms": "", "time_ms": ""}
        if kind == "log" and i % 50 == 1:
            row |= {"duration_ms": 0, "video_id": 999_999, "user_id": 5}
        return row

    write_kuairand(tmp_path, "pure", change=change)
    data = load(tmp_path, "kuairand-pure")
    ids, labels, users = all_rows(data)
    column = dict(zip(data.fields, ids.T))
    odd = column["duration"] == 0
    assert 12 <= odd.sum() <= 14
    assert not labels[odd, 2].any() and f"{odd.sum()} rows without duration" in data.note
    stranger = users == 5
    assert stranger.any() and not column["user_id"][stranger].any()
    assert not column["author_id"][stranger].any()
    assert column["video_id"][stranger].all()  # the id itself is hashed, known or not


def test_kuairand_cache_is_used_and_noticed_when_stale_or_damaged(tmp_path, monkeypatch):
    folder = write_kuairand(tmp_path)
    first = load(tmp_path)
    kept = tmp_path / "kuairand-1k" / "parsed" / "train-ids"
    size = kept.stat().st_size
    kept.unlink()  # the arrays of `first` are mapped: never write into them
    kept.write_bytes(bytes(size))
    assert torch.equal(load(tmp_path).train.ids, first.train.ids)
    monkeypatch.setattr(behavior, "_parse", lambda *_: pytest.fail("parsed"))
    assert load(tmp_path).digest == first.digest
    with pytest.raises(pytest.fail.Exception, match="parsed"):
        load(tmp_path, hash_bits=9)
    users = folder / "user_features_1k.csv"
    users.write_text(users.read_text().replace("31-60", "31-61"))
    with pytest.raises(pytest.fail.Exception, match="parsed"):
        load(tmp_path)


def census_lines(rows, seed=0, change=lambda cells, i: cells):
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        row = {name: str(rng.integers(4)) for name in behavior.CENSUS_COLUMNS}
        row["marital_status"] = ["Never married", "Divorced", "Widowed"][rng.integers(3)]
        row["income"] = ["- 50000.", "50000+."][int(rng.random() < 0.2)]
        row["dividends"] = str(int(10 ** rng.uniform(0, 4)))
        row |= {"instance_weight": "1032.38", "migration_msa": "?"}
        lines.append(", ".join(change(list(row.values()), i)))
    return "\n".join(lines) + "\n"


def write_census(root, parts=("data", "test"), **options):
    (root / "census").mkdir(exist_ok=True, parents=True)
    for seed, part in enumerate(parts):
        content = census_lines(200 - 80 * seed, seed, **options).encode()
        path = root / "census" / f"census-income.{part}.gz"
        path.write_bytes(gzip.compress(content))


def sizes_of(data):
    return [len(part.labels) for part in (data.train, data.val, data.test)]


def test_census_benchmark_split_and_labels(tmp_path):
    write_census(tmp_path)
    data = behavior.load("census", tmp_path)
    assert sizes_of(data) == [180, 20, 120] and not data.note
    assert data.tasks == ("over_50k", "never_married") and len(data.fields) == 39
    assert not set(data.fields) & {"income", "marital_status", "instance_weight"}
    lines = census_lines(200).splitlines()
    assert data.train.labels[:, 0].tolist() == [line.endswith("50000+.") for line in lines[:180]]
    assert data.val.labels[:, 1].tolist() == ["Never married" in line for line in lines[180:]]
    assert data.fields["migration_msa"] == 2 and data.fields["age"] == 5
    write_census(tmp_path / "one", ("test",))
    data = behavior.load("census", tmp_path / "one")
    assert sizes_of(data) == [160, 20, 20]
    assert "only census-income.test.gz" in data.note and "not the benchmark's split" in data.note


def test_census_values_not_seen_in_training_are_id_0_and_money_is_in_half_octaves(tmp_path):
    write_census(tmp_path, change=lambda cells, i: ["77" if i >= 185 else "30", *cells[1:]])
    data = behavior.load("census", tmp_path)
    age = list(data.fields).index("age")
    assert data.fields["age"] == 2 and data.val.ids[:, age].tolist() == [1] * 5 + [0] * 15
    amounts = [int(line.split(", ")[18]) for line in census_lines(200).splitlines()[:180]]
    octaves = [int(np.ceil(2 * np.log2(1 + amount))) for amount in amounts]
    ids = data.train.ids[:, list(data.fields).index("dividends")].tolist()
    assert len({*zip(octaves, ids)}) == len({*octaves}) == len({*ids}) > 10
