"""data/behavior.py: metrics against pairs counted one by one, readers on small files."""

import csv
import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from data import behavior, download
from data.behavior import expected_auc

# --- metrics --------------------------------------------------------------------------------------


def by_pairs(scores, truth):
    """Every ordered pair of different rows: the first positive with p, the second negative."""
    won = pairs = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if i != j:
                weight = truth[i] * (1 - truth[j])
                pairs += weight
                won += weight * (float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]))
    return won / pairs if pairs else float("nan")


def test_auc_worked_examples():
    assert expected_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert expected_auc([0.5, 0.5, 0.5, 0.9], [0, 1, 0, 1]) == 0.75  # ties count a half
    assert expected_auc([0.1, 0.2, 0.3], [0.1, 0.5, 0.3]) == pytest.approx(0.6492537313, abs=1e-9)
    for scores, labels in (([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 0]), ([], []), ([0.3], [0.4])):
        assert np.isnan(expected_auc(scores, labels))  # one class is no exception
    assert np.isnan(expected_auc([1, 2], [1, 0], [7, 8]))


def test_gauc_worked_example_skips_users_of_one_class():
    scores = [0.1, 0.4, 0.35, 0.8, 0.9, 0.2, 0.3]
    labels, users = [0, 0, 1, 1, 0, 1, 1], [5, 5, 5, 5, 9, 9, 2]
    assert expected_auc(scores, labels, users) == 0.5  # (0.75 * 4 + 0 * 2) / 6


def test_gauc_knows_neither_the_order_of_rows_nor_the_scale_of_a_user():
    rng = np.random.default_rng(0)
    scores, labels, users = (
        rng.normal(size=300),
        rng.integers(2, size=300),
        rng.integers(20, size=300),
    )
    order, slope = rng.permutation(300), rng.uniform(0.5, 2, size=20)
    expected = pytest.approx(expected_auc(scores, labels, users), abs=1e-12)
    assert expected_auc(scores[order], labels[order], users[order]) == expected
    assert expected_auc(np.exp(slope[users] * scores) + users, labels, users) == expected


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 7, 30])
def test_metrics_equal_counting_pairs(rows, soft):
    rng = np.random.default_rng(1)
    scores = rng.integers(5, size=rows) / 4  # many ties
    truth = rng.random(rows) if soft else rng.integers(2, size=rows).astype(float)
    users = rng.integers(3, size=rows)
    close = lambda value: pytest.approx(value, abs=1e-12, nan_ok=True)
    assert expected_auc(scores, truth) == close(by_pairs(scores, truth))
    total = weight = 0.0
    for user in set(users):
        value = by_pairs(scores[users == user], truth[users == user])
        if not np.isnan(value):
            total += value * (users == user).sum()
            weight += (users == user).sum()
    assert expected_auc(scores, truth, users) == close(total / weight if weight else np.nan)


def test_expected_auc_is_the_mean_over_drawn_labels():
    rng = np.random.default_rng(2)
    scores, truth = rng.normal(size=400), rng.random(400)
    drawn = np.mean([expected_auc(scores, rng.random(400) < truth) for _ in range(300)])
    assert drawn == pytest.approx(expected_auc(scores, truth), abs=0.005)


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([0.1, np.nan], [0, 1], "1 of 2 scores are NaN"),
        ([0.1, 0.2], [0, np.nan], "row 1 holds nan"),
        ([0.1, 0.2], [2, 1], "row 0 holds 2.0"),
        ([0.1, 0.2], [0, 1, 1], "one column each"),
    ],
)
def test_metrics_refuse_bad_columns(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        expected_auc(scores, labels)


def test_ranking_leaves_constant_tasks_out_of_the_mean():
    labels = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])
    part = behavior.Part(torch.zeros(4, 1), labels, torch.zeros(4))
    found = behavior.ranking(np.array([[0.1, 1], [0.4, 2], [0.35, 3], [0.8, 4]]), part, [0])
    assert found["auc"] == [0.75, None] and found["mean_auc"] == 0.75 and found["mean_gauc"] == 0.75


# --- the generated log ----------------------------------------------------------------------------


def test_generated_rates_repeatability_and_truth():
    data = behavior.synthetic(3, rows=40_000)
    rates = data.train.truth.double().mean(dim=0)
    assert rates.tolist() == pytest.approx(list(behavior.RATES.values()), rel=0.06)
    assert data.train.labels.double().mean(dim=0).tolist() == pytest.approx(rates.tolist(), rel=0.2)
    again, other = (behavior.synthetic(seed, rows=40_000).digest for seed in (3, 4))
    assert again == data.digest != other
    assert data.tasks == tuple(behavior.RATES) and len(data.test.labels) == 8000
    oracle = behavior.ranking(data.test.truth.numpy(), data.test, [7])
    assert 0.84 < min(oracle["auc"]) and max(oracle["auc"]) < 0.96


def test_generated_groups_disagree_about_duration():
    data = behavior.synthetic(0, rows=40_000)
    duration = data.train.ids[:, list(data.fields).index("duration")].double()
    logits = data.train.truth.double().logit().T
    slope = [float(torch.corrcoef(torch.stack([duration, row]))[0, 1]) for row in logits]
    assert min(slope[:3]) > 0.15 and max(slope[3:]) < -0.15


def test_rare_and_frequent_tasks_and_bad_sizes():
    data = behavior.synthetic(0, rows=20_000)
    assert behavior.rare_and_frequent(data) == ([5, 6, 7], [0, 1, 2])
    with pytest.raises(ValueError, match="users 0"):
        behavior.synthetic(0, rows=100, users=0)


def test_check_names_the_culprit():
    data = behavior.synthetic(0, rows=5000)
    labels = data.train.labels.clone()
    labels[:, 4] = 0
    constant = data._replace(train=data.train._replace(labels=labels))
    with pytest.raises(ValueError, match="'profile' cannot be learnt, every training label is 0"):
        behavior.check(constant)
    with pytest.raises(ValueError, match="item has ids 0 to 1999; its table has 5 rows"):
        behavior.check(data._replace(fields=data.fields | {"item": 5}))
    empty = data.test.each(lambda tensor: tensor[:0])
    with pytest.raises(ValueError, match="the test part has no rows"):
        behavior.check(data._replace(test=empty))


def test_batches_are_a_function_of_the_step_and_take_each_row_once_an_epoch():
    rows = torch.arange(11)
    part = behavior.Part(rows[:, None], rows[:, None] % 2, rows, rows[:, None] / 11)
    batches = behavior.batch_maker(part, 3, seed=5)
    rows_of = lambda maker, step: maker(step).ids[:, 0].tolist()
    epochs = [[rows_of(batches, step) for step in steps] for steps in (range(3), range(3, 6))]
    for epoch in epochs:  # two of the eleven are left out
        assert [len(batch) for batch in epoch] == [3, 3, 3]
        assert len({row for batch in epoch for row in batch}) == 9
    again, other = (behavior.batch_maker(part, 3, seed=seed) for seed in (5, 6))
    assert rows_of(again, 4) == epochs[1][1] and rows_of(again, 1) == epochs[0][1]  # in any order
    assert epochs[0] != epochs[1] and rows_of(other, 0) != epochs[0][0]
    batch = again(2)
    assert torch.equal(batch.labels, batch.ids % 2)
    assert batch.users is batch.truth is None


# --- KuaiRand -------------------------------------------------------------------------------------

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
).split(",")
USER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range"
).split(",")
USER += [f"onehot_feat{i}" for i in range(18)]
VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
).split(",")


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            cells = [row.get(name) for name in header]
            writer.writerow(["" if cell is None else cell for cell in cells])


def write_kuairand(root, version="1k", rows=600, change=lambda kind, row, i: row, drop="", seed=0):
    """The four files as published, random but for what a test changes: change(kind, row, i)."""
    rng = np.random.default_rng(seed)
    name = {"1k": "1K", "pure": "Pure"}[version]
    folder = root / f"kuairand-{version}" / f"KuaiRand-{name}" / "data"
    users, videos, logs = [], [], []
    for u in range(12):
        row = dict.fromkeys(USER, 0) | {"user_id": 10 + u, "register_days_range": "31-60"}
        row["user_active_degree"] = ["full_active", "UNKNOWN"][u % 2]
        row["fans_user_num_range"] = ["0", "[1,10)"][u % 2]
        row["is_live_streamer"] = [-124, 0, 1][u % 3]
        row |= {f"onehot_feat{i}": [None, 0.0, 1.0][(u + i) % 3] for i in range(18)}
        users.append(row)
    for v in range(40):
        row = dict.fromkeys(VIDEO, 1.0) | {"video_id": v, "author_id": 1000 + v // 3}
        row |= {"upload_dt": "2022-04-01", "music_id": 3_000_000_000 + v}
        row["video_type"] = ["NORMAL", "AD"][v % 2]
        row["video_duration"] = [None, 8000.0][v % 2]
        row["tag"] = ["12,65", "8", None, "12"][v % 4]
        videos.append(row)
    for i in range(rows):
        day = int(rng.integers(8, 39))  # 8 April to 8 May
        row = dict.fromkeys(LOG, 0) | {"time_ms": 1_650_000_000_000 + i}
        row["user_id"], row["video_id"] = 10 + int(rng.integers(12)), int(rng.integers(40))
        row["date"] = 20220400 + day if day <= 30 else 20220500 + day - 30
        row["hourmin"] = 100 * int(rng.integers(24)) + 30
        row["play_time_ms"] = int(rng.integers(0, 20_000))
        row["duration_ms"] = int(rng.integers(1000, 20_000))
        row |= {name: int(rng.random() < 0.4) for name in (*LOG[5:12], "is_profile_enter")}
        row["tab"] = int(rng.integers(15))
        logs.append(row)
    logs.sort(key=lambda row: row["date"])
    early = [row for row in logs if row["date"] <= 20220421]
    files = {
        f"log_standard_4_08_to_4_21_{version}": (LOG, early, "log"),
        f"log_standard_4_22_to_5_08_{version}": (LOG, logs[len(early) :], "log"),
        f"user_features_{version}": (USER, users, "user"),
        f"video_features_basic_{version}": (VIDEO, videos, "video"),
    }
    for stem, (header, content, kind) in files.items():
        content = [change(kind, dict(row), i) for i, row in enumerate(content)]
        write_csv(folder / f"{stem}.csv", [name for name in header if name != drop], content)
    return folder


def all_rows(data):
    parts = (data.train, data.val, data.test)
    columns = lambda kind: np.concatenate([getattr(part, kind).numpy() for part in parts])
    return [columns(kind) for kind in ("ids", "labels", "users")]


def test_kuairand_from_both_logs_split_by_date(tmp_path):
    folder = write_kuairand(tmp_path)
    data = behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    logs = [folder / f"log_standard_{days}_1k.csv" for days in ("4_08_to_4_21", "4_22_to_5_08")]
    rows = [row for log in logs for row in csv.DictReader(open(log))]
    spans = [(0, 20220506), (20220507, 20220507), (20220508, 20220508)]
    split = [[row for row in rows if low <= int(row["date"]) <= high] for low, high in spans]
    sizes = [len(part.labels) for part in (data.train, data.val, data.test)]
    assert sizes == [len(part) for part in split]
    ids, labels, users = all_rows(data)
    flat = [row for part in split for row in part]
    number = lambda column: [int(row[column]) for row in flat]
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
    assert all(max(column[name]) < size for name, size in data.fields.items())
    unknown = [(user - 10) % 3 == 0 for user in number("user_id")]  # -124, or an empty cell
    for name in ("is_live_streamer", "onehot_feat0"):
        assert [value == 0 for value in column[name]] == unknown
    tags = {(video % 4, tag) for video, tag in zip(number("video_id"), column["tag"])}
    assert tags == {(0, 1), (1, 2), (2, 0), (3, 1)}  # "12,65" counts as 12; an empty cell is id 0
    authors = {
        (video // 3, author) for video, author in zip(number("video_id"), column["author_id"])
    }
    assert len(authors) == len({author for author, _ in authors})  # one id for one author
    assert "valid play" in data.note


def test_kuairand_reads_no_statistics_no_random_log_and_nothing_after_the_exposure(tmp_path):
    folder = write_kuairand(tmp_path)
    before = behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    for name in ("video_features_statistic_1k.csv", "log_random_4_22_to_5_08_1k.csv"):
        (folder / name).write_text("poison\n")
    other = tmp_path / "other"
    later = {"profile_stay_time": 7, "comment_stay_time": 7, "is_hate": 1}

    def change(kind, row, i):
        return row | later | {"play_time_ms": 7 + 10**5 * (i % 2)} if kind == "log" else row

    write_kuairand(other, change=change)
    changed = behavior.load("kuairand-1k", other, hash_bits=10)
    assert np.array_equal(all_rows(before)[0], all_rows(changed)[0])  # only `finish` differs
    fields = set(before.fields)
    assert not fields & {"play_time_ms", *later, *behavior.LABELS.values()}
    members = download.DATASETS["kuairand-1k"].files[0].members
    assert len(members) == 4
    assert not any("statistic" in name or "random" in name for name in members)


def test_kuairand_pure_empty_cells_and_unknown_ids(tmp_path):
    def change(kind, row, i):
        if kind == "log" and i % 50 == 0:
            row |= {"duration_ms": "", "time_ms": ""}
        if kind == "log" and i % 50 == 1:
            row |= {"duration_ms": 0, "video_id": 999_999, "user_id": 5}
        return row

    write_kuairand(tmp_path, "pure", change=change)
    data = behavior.load("kuairand-pure", tmp_path, hash_bits=10)
    ids, labels, users = all_rows(data)
    column = dict(zip(data.fields, ids.T))
    odd = column["duration"] == 0
    assert 24 <= odd.sum() <= 26
    assert not labels[odd, 2].any() and f"{odd.sum()} rows without duration" in data.note
    stranger = users == 5
    assert stranger.any()
    assert not column["user_id"][stranger].any() and not column["author_id"][stranger].any()
    assert column["video_id"][stranger].all()  # the id itself is hashed, known or not


def test_kuairand_cache_is_used_and_noticed_when_stale(tmp_path, monkeypatch):
    folder = write_kuairand(tmp_path)
    first = behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    monkeypatch.setattr(behavior, "_parse", lambda *_: pytest.fail("the cache was not used"))
    assert behavior.load("kuairand-1k", tmp_path, hash_bits=10).digest == first.digest
    monkeypatch.undo()
    other = behavior.load("kuairand-1k", tmp_path, hash_bits=9)
    assert other.fields["video_id"] == 512 and other.fields["author_id"] == 128
    log = folder / "log_standard_4_22_to_5_08_1k.csv"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")  # a test row fewer
    shorter = behavior.load("kuairand-1k", tmp_path, hash_bits=9)
    assert len(shorter.test.labels) == len(first.test.labels) - 1
    users = folder / "user_features_1k.csv"
    users.write_text(users.read_text().replace("full_active", "half_active"))
    stamp = users.stat()
    behavior.load("kuairand-1k", tmp_path, hash_bits=9)
    users.write_text(users.read_text().replace("31-60", "31-61"))
    # the same size, and an older time stamp
    os.utime(users, ns=(stamp.st_atime_ns, stamp.st_mtime_ns - 1))
    monkeypatch.setattr(behavior, "_parse", lambda *_: pytest.fail("parsed"))
    with pytest.raises(pytest.fail.Exception, match="parsed"):
        behavior.load("kuairand-1k", tmp_path, hash_bits=9)
    left = sorted(path.name for path in (tmp_path / "kuairand-1k").iterdir())
    assert left == ["KuaiRand-1K", "parsed"]


def test_hash_keeps_ids_apart_and_inside_the_table():
    ids = np.arange(2000.0)
    hashed = behavior._hash(ids, 20)
    assert hashed.min() >= 1 and hashed.max() < 2**20 and len(set(hashed.tolist())) > 1990
    assert behavior._hash(np.array([np.nan, 3e9]), 8)[0] == 0


def changed_rows(kind_wanted, **cells):
    return lambda kind, row, i: row | cells if kind == kind_wanted else row


def poison(kind_wanted, cells):
    return lambda kind, row, i: row | cells if kind == kind_wanted and i == 3 else row


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drop": "is_like"}, "4_08_to_4_21_1k.csv, line 1: the header lacks is_like"),
        ({"drop": "onehot_feat7"}, "user_features_1k.csv, line 1: the header lacks onehot_feat7"),
        ({"drop": "tag"}, "video_features_basic_1k.csv, line 1: the header lacks tag"),
        ({"change": changed_rows("log", is_forward=0)}, "task 'forward' cannot be learnt"),
        ({"change": changed_rows("log", date=20220410)}, "the val part has no rows"),
    ],
)
def test_kuairand_columns_and_parts_that_are_missing(tmp_path, options, message):
    write_kuairand(tmp_path, rows=200, **options)
    with pytest.raises(ValueError, match=message):
        behavior.load("kuairand-1k", tmp_path, hash_bits=10)


@pytest.mark.parametrize(
    "kind, cells, message",
    [
        ("log", {"is_like": ""}, "_1k.csv, line 5: is_like is nan; a whole number from 0 to 1"),
        ("log", {"is_follow": 2}, "line 5: is_follow is 2; a whole number from 0 to 1"),
        ("log", {"long_view": "yes"}, "4_21_1k.csv, line 5: long_view 'yes' is not numeric"),
        ("log", {"play_time_ms": "1_0"}, "line 5: play_time_ms '1_0' is not numeric"),
        ("log", {"play_time_ms": "inf"}, "line 5: play_time_ms is inf; a whole number"),
        ("log", {"duration_ms": 2**25}, "line 5: duration_ms is 33554432; .* to 33554431"),
        ("log", {"tab": 99}, "line 5: tab is 99; a whole number from 0 to 14"),
        ("log", {"user_id": ""}, "line 5: user_id is nan"),
        ("log", {"user_id": 1.5}, "line 5: user_id is 1.5; a whole number from 0"),
        ("log", {"user_id": -1}, "line 5: user_id is -1; a whole number"),
        ("log", {"video_id": "1e30"}, r"line 5: video_id is 1e\+30; a whole number"),
        ("log", {"date": 20220509}, "line 5: date is 20220509; .* to 20220508"),
        ("log", {"date": 19700101}, "line 5: date is 19700101; .* from 20220408"),
        ("user", {"user_id": 10}, "user_features_1k.csv: id 10 is there twice"),
        ("video", {"video_id": 7}, "video_features_basic_1k.csv: id 7 is there twice"),
        ("user", {"user_id": "nan"}, "line 5: user_id 'nan' is not finite"),
        ("video", {"author_id": "x"}, "line 5: an id 'x' is not numeric"),
        ("video", {"music_id": 1.5}, "line 5: an id 1.5 is no whole number"),
    ],
)
def test_kuairand_mistakes_name_the_culprit(tmp_path, kind, cells, message):
    write_kuairand(tmp_path, rows=200, change=poison(kind, cells))
    with pytest.raises(ValueError, match=message):
        behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    assert not list((tmp_path / "kuairand-1k").glob(".parsed-*"))


def test_kuairand_line_numbers_go_on_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(behavior, "CHUNK", 16)
    seven = lambda kind, row, i: row | {"is_like": 7} if kind == "log" and i == 37 else row
    write_kuairand(tmp_path, change=seven)
    with pytest.raises(ValueError, match="4_21_1k.csv, line 39: is_like is 7"):
        behavior.load("kuairand-1k", tmp_path, hash_bits=10)


def test_kuairand_odd_files_are_read_alike_or_refused_by_name(tmp_path):
    folder = write_kuairand(tmp_path, rows=300)
    expected = behavior.load("kuairand-1k", tmp_path, hash_bits=10).digest
    log, video = folder / "log_standard_4_22_to_5_08_1k.csv", folder / "video_features_basic_1k.csv"
    good_log, good_video = log.read_bytes(), video.read_bytes()
    # as a spreadsheet saves it
    log.write_bytes(b"\xef\xbb\xbf" + good_log.replace(b"\n", b"\r\n") + b"\n\n")
    video.write_bytes(b"\xef\xbb\xbf" + good_video + b"\n")
    assert behavior.load("kuairand-1k", tmp_path, hash_bits=10).digest == expected
    last = good_log.splitlines()[-1]
    tail = last[last.index(b",") :]
    for content, message in (
        (good_log + b"9," + last + b"\n", "20 columns, not 19 as in the header"),
        (good_log + b"1,2,3\n", "3 columns, not 19 as in the header"),
        (good_log + b"#" + last + b"\n", "user_id '#.* is not numeric"),
        (good_log + b"inf" + tail + b"\n", "user_id is inf; a whole number"),
        (good_log + b"\xff\n", "not UTF-8"),
        (good_log[:-3], "has no end: the file is cut off"),  # else 12 would be read as 1
        (good_log.replace(b"tab", b"user_id", 1), "the header lacks tab"),
        (good_log.replace(b"is_hate", b"is_like", 1), "has a column twice"),
    ):
        log.write_bytes(content)
        with pytest.raises(ValueError, match=f"{log.name}.*{message}"):
            behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    log.write_bytes(good_log)
    video.write_bytes(good_video + b'7,"' + b"x" * 200_000 + b"\n")  # a quote that is never closed
    with pytest.raises(ValueError, match=f"{video.name}, line 42: .*field larger"):
        behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    video.write_bytes(good_video + b"1,2,3\n")
    with pytest.raises(ValueError, match=f"{video.name}, line .*3 columns, not"):
        behavior.load("kuairand-1k", tmp_path, hash_bits=10)


def test_kuairand_damaged_cache_is_read_anew(tmp_path):
    write_kuairand(tmp_path, rows=300)
    first = behavior.load("kuairand-1k", tmp_path, hash_bits=10)
    parsed = tmp_path / "kuairand-1k" / "parsed"
    zeros = bytes((parsed / "train-ids").stat().st_size)  # of the right size
    meta = (parsed / "meta.json").read_bytes()
    info = (parsed / "info.json").read_bytes()
    damages = [("train-ids", b"short"), ("train-ids", zeros)]
    damages += [("info.json", info.replace(b"16", b"17"))]
    damages += [("meta.json", b"[1]"), ("meta.json", b'{"key": 1}'), ("meta.json", meta[:-9])]
    for name, content in damages:
        (parsed / name).unlink()  # the arrays of `first` are mapped: never write into them
        (parsed / name).write_bytes(content)
        again = behavior.load("kuairand-1k", tmp_path, hash_bits=10)
        assert again.digest == first.digest and torch.equal(again.train.ids, first.train.ids)
        assert again.fields == first.fields


def test_kuairand_archive_with_a_wrong_md5_is_one_line(tmp_path):
    archive = tmp_path / "kuairand-1k" / "KuaiRand-1K.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"not the archive")
    told = "md5 .* not 6b0b9c8222d67fcd4c676218edca3f1f.*delete it first"
    with pytest.raises(download.DownloadError, match=told):
        behavior.load("kuairand-1k", tmp_path)


def test_kuairand_from_an_archive_put_there_by_hand(tmp_path, monkeypatch):
    folder = write_kuairand(tmp_path / "made")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        tar.add(folder.parent, arcname="KuaiRand-1K")
        tar.addfile(tarfile.TarInfo("KuaiRand-1K/data/video_features_statistic_1k.csv"))
    root = tmp_path / "root"
    (root / "kuairand-1k").mkdir(parents=True)
    (root / "kuairand-1k" / "KuaiRand-1K.tar.gz").write_bytes(raw.getvalue())
    row = download.DATASETS["kuairand-1k"]
    file = replace(row.files[0], checksum="md5:" + hashlib.md5(raw.getvalue()).hexdigest())
    monkeypatch.setitem(download.DATASETS, "kuairand-1k", replace(row, files=(file,)))
    assert not behavior.is_here("kuairand-1k", root)
    data = behavior.load("kuairand-1k", root, hash_bits=10)
    assert behavior.is_here("kuairand-1k", root) and len(data.train.labels) > 400
    assert not list(root.rglob("*statistic*"))


def test_published_checksums_and_unknown_names(tmp_path):
    pure = download.DATASETS["kuairand-pure"].files[0]
    assert pure.checksum == "md5:0820331067a3784d9691136f772b35a7"
    assert pure.url.endswith("KuaiRand-Pure.tar.gz")
    with pytest.raises(ValueError, match="data is 'kuairand'; allowed: synthetic, kuairand-1k"):
        behavior.load("kuairand", tmp_path)
    with pytest.raises(ValueError, match="hash_bits is 40"):
        behavior.load("kuairand-1k", tmp_path, hash_bits=40)


# --- Census-Income --------------------------------------------------------------------------------


def census_lines(rows, seed=0, change=lambda cells, i: cells):
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        cells = [str(rng.integers(4)) for _ in behavior.CENSUS_COLUMNS]
        named = dict(zip(behavior.CENSUS_COLUMNS, cells))
        states = ["Never married", "Divorced", "Married-civilian spouse present"]
        named["marital_status"] = states[rng.integers(3)]
        named["income"] = ["- 50000.", "50000+."][int(rng.random() < 0.2)]
        named["citizenship"] = "Native- Born in U S "
        named["dividends"] = str(int(10 ** rng.uniform(0, 4)))
        named |= {"instance_weight": "1032.38", "migration_msa": "?"}
        lines.append(", ".join(change(list(named.values()), i)))
    return "\n".join(lines) + "\n"


def write_census(root, parts=("data", "test"), zipped=True, **options):
    (root / "census").mkdir(exist_ok=True)
    for seed, part in enumerate(parts):
        text = census_lines(200 - 80 * seed, seed, **options)
        path = root / "census" / f"census-income.{part}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())


def test_census_benchmark_split_and_labels(tmp_path):
    write_census(tmp_path)
    data = behavior.load("census", tmp_path)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [180, 20, 120]
    assert not data.note
    assert data.tasks == ("over_50k", "never_married") and len(data.fields) == 39
    assert not set(data.fields) & {"income", "marital_status", "instance_weight"}
    lines = census_lines(200, 0).splitlines()
    rich = [int(line.endswith("50000+.")) for line in lines]
    never = [int("Never married" in line) for line in lines]
    assert data.train.labels[:, 0].tolist() == rich[:180]
    assert data.val.labels[:, 1].tolist() == never[180:]
    assert data.fields["migration_msa"] == 2 and data.fields["age"] == 5
    again = tmp_path / "plain"
    again.mkdir()
    write_census(again, zipped=False)
    assert behavior.load("census", again).digest == data.digest


def test_census_values_not_seen_in_training_are_id_0_and_money_is_in_half_octaves(tmp_path):
    write_census(tmp_path, change=lambda cells, i: ["77" if i >= 185 else "30", *cells[1:]])
    data = behavior.load("census", tmp_path)
    age = list(data.fields).index("age")
    assert data.fields["age"] == 2 and data.val.ids[:, age].tolist() == [1] * 5 + [0] * 15
    money = list(data.fields).index("dividends")
    amounts = [int(line.split(", ")[18]) for line in census_lines(200, 0).splitlines()[:180]]
    octave = {a: int(np.ceil(2 * np.log2(1 + a))) for a in amounts}
    ids = dict(zip(amounts, data.train.ids[:, money].tolist()))
    for a, b in combinations(amounts[:40], 2):
        assert (ids[a] == ids[b]) == (octave[a] == octave[b])


def test_census_with_one_file_says_so(tmp_path):
    write_census(tmp_path, ("test",))
    data = behavior.load("census", tmp_path)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [160, 20, 20]
    assert "only census-income.test.gz" in data.note and "not the benchmark's split" in data.note


def put(at, word):
    """A cell of every line becomes another word."""
    return lambda cells, i: [*cells[:at], word, *cells[at:][1:]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cells, i: cells[: 41 + (i != 4)], "income.data.gz, line 5: 41 columns, 42"),
        (put(41, "rich"), "line 1: income 'rich' is not one of"),
        (put(41, "- 50000."), "'over_50k' cannot be learnt"),
        (put(18, "many"), "line 1: dividends 'many' is not numeric"),
        (put(18, "nan"), "line 1: dividends 'nan' is not finite"),
        (put(18, "-5"), "line 1: dividends is -5.0, below 0"),
        (put(7, "never married"), "line 1: marital status 'never"),
    ],
)
def test_census_mistakes_name_the_culprit(tmp_path, change, message):
    write_census(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        behavior.load("census", tmp_path)


def test_census_damaged_file(tmp_path):
    write_census(tmp_path)
    path = tmp_path / "census" / "census-income.data.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="census-income.data.gz, line .* is damaged"):
        behavior.load("census", tmp_path)


def test_census_file_that_unpacks_without_end(tmp_path, monkeypatch):
    write_census(tmp_path)
    path = tmp_path / "census" / "census-income.data.gz"
    path.write_bytes(gzip.compress(b"7" * 30_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1: has more than 1,048,576 bytes"):
        behavior.load("census", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000  # the line is not read whole
    tracemalloc.stop()
    write_census(tmp_path)
    monkeypatch.setattr(behavior, "CENSUS_LIMIT", 100)
    with pytest.raises(ValueError, match="census-income.data.gz, line 101: has more than 100 rows"):
        behavior.load("census", tmp_path)


def test_nominal_sizes_need_no_file(tmp_path):
    for name in ("kuairand-1k", "kuairand-pure", "census"):
        data = behavior.nominal(name)
        assert not behavior.is_here(name, tmp_path) and "not here yet" in data.note
        assert data.train.ids.shape[1] == len(data.fields)
        assert data.train.labels.shape[1] == len(data.tasks)
    assert list(behavior.nominal("kuairand-1k").fields).count("video_id") == 1
    write_kuairand(tmp_path, rows=300)
    real = behavior.load("kuairand-1k", tmp_path)
    assert set(real.fields) == set(behavior.nominal("kuairand-1k").fields)
    info = tmp_path / "kuairand-1k" / "parsed" / "info.json"
    assert json.loads(info.read_text())["fields"] == real.fields
