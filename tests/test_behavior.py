"""data/behavior.py: metrics against pairs counted one by one, readers on small files."""

import csv
import gzip
import hashlib
import io
import os
import tarfile
import tracemalloc
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from data import behavior, download
from data.behavior import expected_auc

# --- metrics --------------------------------------------------------------------------------------


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


BAD_COLUMNS = [
    ([0.1, np.nan], [0, 1], "1 of 2 scores are NaN"),
    ([0.1, 0.2], [0, np.nan], "row 1 holds nan"),
    ([0.1, 0.2], [2, 1], "row 0 holds 2.0"),
    ([0.1, 0.2], [0, 1, 1], "one column each"),
]


@pytest.mark.parametrize("scores, labels, message", BAD_COLUMNS)
def test_metrics_refuse_bad_columns(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        expected_auc(scores, labels)


def test_ranking_leaves_constant_tasks_out_of_the_mean():
    labels = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])
    part = behavior.Part(torch.zeros(4, 1), labels, torch.zeros(4))
    found = behavior.ranking(np.array([[0.1, 1], [0.4, 2], [0.35, 3], [0.8, 4]]), part, [0])
    assert found["auc"] == [0.75, None] and found["mean_auc"] == 0.75 and found["mean_gauc"] == 0.75


# --- the generated log ----------------------------------------------------------------------------


def test_the_generated_log_has_the_rates_and_the_groups_that_it_promises():
    data = behavior.synthetic(3, rows=40_000)
    rates = data.train.truth.double().mean(dim=0)
    assert rates.tolist() == pytest.approx(list(behavior.RATES.values()), rel=0.06)
    assert data.train.labels.double().mean(dim=0).tolist() == pytest.approx(rates.tolist(), rel=0.2)
    assert data.tasks == tuple(behavior.RATES) and len(data.test.labels) == 8000
    assert behavior.rare_and_frequent(data) == ([5, 6, 7], [0, 1, 2])
    best = behavior.ranking(data.test.truth.numpy(), data.test, [7])
    assert 0.84 < min(best["auc"]) and max(best["auc"]) < 0.96
    # Duration raises every watch task and lowers every interaction.
    duration = data.train.ids[:, list(data.fields).index("duration")].double()
    logits = data.train.truth.double().logit().T
    slope = [float(torch.corrcoef(torch.stack([duration, row]))[0, 1]) for row in logits]
    assert min(slope[:3]) > 0.15 and max(slope[3:]) < -0.15


def test_the_generated_log_follows_its_seed_and_check_names_the_culprit():
    data = behavior.synthetic(3, rows=5000)
    again, other = (behavior.synthetic(seed, rows=5000).digest for seed in (3, 4))
    assert again == data.digest != other
    labels = data.train.labels.clone()
    labels[:, 4] = 0
    spoilt = {
        "'profile' cannot be learnt, every training label is 0": data._replace(
            train=data.train._replace(labels=labels)
        ),
        "item has ids 0 to 1999; its table has 5 rows": data._replace(
            fields=data.fields | {"item": 5}
        ),
        "the test part has no rows": data._replace(test=data.test.cut(0, 0)),
    }
    for message, log in spoilt.items():
        with pytest.raises(ValueError, match=message):
            behavior.check(log)
    with pytest.raises(ValueError, match="users 0"):
        behavior.synthetic(0, rows=100, users=0)


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


def a_user(number):
    row = dict.fromkeys(USER, 0) | {"user_id": 10 + number, "register_days_range": "31-60"}
    row["user_active_degree"] = ["full_active", "UNKNOWN"][number % 2]
    row["is_live_streamer"] = [-124, 0, 1][number % 3]
    return row | {f"onehot_feat{i}": ["", 0.0, 1.0][(number + i) % 3] for i in range(18)}


def a_video(number):
    row = dict.fromkeys(VIDEO, 1.0) | {"video_id": number, "author_id": 1000 + number // 3}
    row |= {"upload_dt": "2022-04-01", "music_id": 3_000_000_000 + number}
    row["video_type"] = ["NORMAL", "AD"][number % 2]
    row["tag"] = ["12,65", "8", "", "12"][number % 4]
    return row


def an_exposure(number, rng):
    row = dict.fromkeys(LOG, 0) | {"time_ms": 1_650_000_000_000 + number}
    row["user_id"], row["video_id"] = 10 + rng.integers(12), rng.integers(40)
    day = rng.integers(8, 39)  # 8 April to 8 May
    row["date"] = 20220400 + day if day <= 30 else 20220500 + day - 30
    row["hourmin"] = 100 * rng.integers(24) + 30
    row["play_time_ms"], row["duration_ms"] = rng.integers(20_000), rng.integers(1000, 20_000)
    row |= {name: int(rng.random() < 0.4) for name in (*LOG[5:12], "is_profile_enter")}
    row["tab"] = rng.integers(15)
    return row


def write_kuairand(root, version="1k", rows=300, change=lambda kind, row, i: row, drop=""):
    """The four files as published, random but for what a test changes: change(kind, row, i)."""
    rng = np.random.default_rng(0)
    name = {"1k": "1K", "pure": "Pure"}[version]
    folder = root / f"kuairand-{version}" / f"KuaiRand-{name}" / "data"
    folder.mkdir(parents=True)
    log = sorted((an_exposure(i, rng) for i in range(rows)), key=lambda row: row["date"])
    early = [row for row in log if row["date"] <= 20220421]
    files = {
        f"log_standard_4_08_to_4_21_{version}": (LOG, early, "log"),
        f"log_standard_4_22_to_5_08_{version}": (LOG, log[len(early) :], "log"),
        f"user_features_{version}": (USER, [a_user(i) for i in range(12)], "user"),
        f"video_features_basic_{version}": (VIDEO, [a_video(i) for i in range(40)], "video"),
    }
    for stem, (columns, content, kind) in files.items():
        columns = [column for column in columns if column != drop]
        with open(folder / f"{stem}.csv", "w", newline="") as file:
            options = {"lineterminator": "\n", "extrasaction": "ignore"}
            writer = csv.DictWriter(file, columns, **options)
            writer.writeheader()
            writer.writerows(change(kind, row, i) for i, row in enumerate(content))
    return folder


def load(root, name="kuairand-1k", hash_bits=10):
    return behavior.load(name, root, hash_bits=hash_bits)


def all_rows(data):
    parts = (data.train, data.val, data.test)
    return [np.concatenate([getattr(part, kind) for part in parts]) for kind in behavior.ARRAYS]


def test_kuairand_from_both_logs_split_by_date(tmp_path):
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
    assert all(max(column[name]) < size for name, size in data.fields.items())
    unknown = [(user - 10) % 3 == 0 for user in number("user_id")]  # -124, or an empty cell
    for name in ("is_live_streamer", "onehot_feat0"):
        assert [value == 0 for value in column[name]] == unknown
    videos = number("video_id")
    tags = {(video % 4, tag) for video, tag in zip(videos, column["tag"])}
    assert tags == {(0, 1), (1, 2), (2, 0), (3, 1)}  # "12,65" counts as 12; an empty cell is id 0
    authors = {(video // 3, author) for video, author in zip(videos, column["author_id"])}
    assert len(authors) == len({author for author, _ in authors})  # one id for one author
    assert "valid play" in data.note


def test_kuairand_reads_no_statistics_and_nothing_after_the_exposure(tmp_path):
    later = {"profile_stay_time": 7, "comment_stay_time": 7, "is_hate": 1}

    def change(kind, row, i):
        return row | later | {"play_time_ms": 7 + 10**5 * (i % 2)} if kind == "log" else row

    folder = write_kuairand(tmp_path)
    for name in ("video_features_statistic_1k.csv", "log_random_4_22_to_5_08_1k.csv"):
        (folder / name).write_text("poison\n")
    write_kuairand(tmp_path / "other", change=change)
    before, changed = load(tmp_path), load(tmp_path / "other")
    assert np.array_equal(all_rows(before)[0], all_rows(changed)[0])  # only `finish` differs
    assert not {*before.fields} & {"play_time_ms", *later, *behavior.LABELS.values()}
    members = " ".join(download.DATASETS["kuairand-1k"].files[0].members)
    assert "statistic" not in members and "random" not in members


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
    assert stranger.any()
    assert not column["user_id"][stranger].any() and not column["author_id"][stranger].any()
    assert column["video_id"][stranger].all()  # the id itself is hashed, known or not


def test_kuairand_cache_is_used_noticed_when_stale_and_read_anew_when_damaged(
    tmp_path, monkeypatch
):
    folder = write_kuairand(tmp_path)
    first = load(tmp_path)
    parsed = tmp_path / "kuairand-1k" / "parsed"
    info, meta = ((parsed / name).read_bytes() for name in ("info.json", "meta.json"))
    damages = [("train-ids", b"short"), ("info.json", info.replace(b"16", b"17"))]
    damages += [("train-ids", bytes((parsed / "train-ids").stat().st_size))]  # the right size
    damages += [("meta.json", b"[1]"), ("meta.json", b'{"key": 1}'), ("meta.json", meta[:-9])]
    for name, content in damages:
        (parsed / name).unlink()  # the arrays of `first` are mapped: never write into them
        (parsed / name).write_bytes(content)
        again = load(tmp_path)
        assert torch.equal(again.train.ids, first.train.ids) and again.fields == first.fields
    monkeypatch.setattr(behavior, "_parse", lambda *_: pytest.fail("parsed"))
    assert load(tmp_path).digest == first.digest
    users = folder / "user_features_1k.csv"
    stamp = users.stat()
    users.write_text(users.read_text().replace("31-60", "31-61"))
    # the same size, and an older time stamp
    os.utime(users, ns=(stamp.st_atime_ns, stamp.st_mtime_ns - 1))
    with pytest.raises(pytest.fail.Exception, match="parsed"):
        load(tmp_path)
    monkeypatch.undo()
    other = load(tmp_path, hash_bits=9)
    assert other.fields["video_id"] == 512 and other.fields["author_id"] == 128
    log = folder / "log_standard_4_22_to_5_08_1k.csv"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")  # a test row fewer
    assert len(load(tmp_path, hash_bits=9).test.labels) == len(first.test.labels) - 1


def test_hash_keeps_ids_apart_and_inside_the_table():
    hashed = behavior._hash(np.arange(2000.0), 20)
    assert hashed.min() >= 1 and hashed.max() < 2**20 and len(set(hashed.tolist())) > 1990
    assert behavior._hash(np.array([np.nan, 3e9]), 8)[0] == 0


KUAIRAND_MISTAKES = [  # file, cells of its rows, which row (None: all), what is said
    ("log", {"is_forward": 0}, None, "task 'forward' cannot be learnt"),
    ("log", {"date": 20220410}, None, "the val part has no rows"),
    ("log", {"is_like": ""}, 3, "_1k.csv, line 5: is_like is nan; a whole number from 0 to 1"),
    ("log", {"is_follow": 2}, 3, "line 5: is_follow is 2; a whole number from 0 to 1"),
    ("log", {"is_like": 7}, 37, "4_21_1k.csv, line 39: is_like is 7"),  # in the third chunk
    ("log", {"long_view": "yes"}, 3, "4_21_1k.csv, line 5: long_view 'yes' is not numeric"),
    ("log", {"play_time_ms": "1_0"}, 3, "line 5: play_time_ms '1_0' is not numeric"),
    ("log", {"play_time_ms": "inf"}, 3, "line 5: play_time_ms is inf; a whole number"),
    ("log", {"duration_ms": 2**25}, 3, "line 5: duration_ms is 33554432; .* to 33554431"),
    ("log", {"tab": 99}, 3, "line 5: tab is 99; a whole number from 0 to 14"),
    ("log", {"user_id": ""}, 3, "line 5: user_id is nan"),
    ("log", {"user_id": 1.5}, 3, "line 5: user_id is 1.5; a whole number from 0"),
    ("log", {"user_id": -1}, 3, "line 5: user_id is -1; a whole number"),
    ("log", {"video_id": "1e30"}, 3, r"line 5: video_id is 1e\+30; a whole number"),
    ("log", {"date": 20220509}, 3, "line 5: date is 20220509; .* to 20220508"),
    ("log", {"date": 19700101}, 3, "line 5: date is 19700101; .* from 20220408"),
    ("user", {"user_id": 10}, 3, "user_features_1k.csv: id 10 is there twice"),
    ("video", {"video_id": 7}, 3, "video_features_basic_1k.csv: id 7 is there twice"),
    ("user", {"user_id": "nan"}, 3, "line 5: user_id 'nan' is not finite"),
    ("video", {"author_id": "x"}, 3, "line 5: an id 'x' is not numeric"),
    ("video", {"music_id": 1.5}, 3, "line 5: an id 1.5 is no whole number"),
]


@pytest.mark.parametrize("kind, cells, row_number, message", KUAIRAND_MISTAKES)
def test_kuairand_mistakes_name_the_culprit(
    kind, cells, row_number, message, tmp_path, monkeypatch
):
    def change(kind_here, row, i):
        return row | cells if kind_here == kind and row_number in (None, i) else row

    monkeypatch.setattr(behavior, "CHUNK", 16)
    write_kuairand(tmp_path, rows=150, change=change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert not list((tmp_path / "kuairand-1k").glob(".parsed-*"))


def test_kuairand_odd_files_are_read_alike_or_refused_by_name(tmp_path):
    folder = write_kuairand(tmp_path)
    expected = load(tmp_path).digest
    log, video = folder / "log_standard_4_22_to_5_08_1k.csv", folder / "video_features_basic_1k.csv"
    good_log, good_video = log.read_bytes(), video.read_bytes()
    # as a spreadsheet saves it
    log.write_bytes(b"\xef\xbb\xbf" + good_log.replace(b"\n", b"\r\n") + b"\n\n")
    video.write_bytes(b"\xef\xbb\xbf" + good_video + b"\n")
    assert load(tmp_path).digest == expected
    damages = [
        (log, good_log + b"1,2,3\n", "3 columns, not 19 as in the header"),
        (log, good_log[:-3], "has no end: the file is cut off"),  # else 12 would be read as 1
        (log, good_log.replace(b"tab", b"user_id", 1), "line 1: the header lacks tab"),
        # a quote that is never closed
        (video, good_video + b'7,"' + b"x" * 200_000 + b"\n", "line 42: .*field larger"),
        (video, good_video.replace(b"tag", b"tug"), "line 1: the header lacks tag"),
        (folder / "user_features_1k.csv", b"user_id\n1\n", "the header lacks .*onehot_feat7"),
    ]
    for path, content, message in damages:
        good = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            load(tmp_path)
        path.write_bytes(good)


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
    assert not behavior.is_here("kuairand-1k", root)
    with pytest.raises(download.DownloadError, match="md5 .* not 6b0b9c8222d67fcd4c676218edca3f1f"):
        load(root)
    file = replace(row.files[0], checksum="md5:" + hashlib.md5(raw.getvalue()).hexdigest())
    monkeypatch.setitem(download.DATASETS, "kuairand-1k", replace(row, files=(file,)))
    data = load(root)
    assert behavior.is_here("kuairand-1k", root) and len(data.train.labels) > 200
    assert not list(root.rglob("*statistic*"))


# --- Census-Income --------------------------------------------------------------------------------


def census_lines(rows, seed=0, change=lambda cells, i: cells):
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        row = {name: str(rng.integers(4)) for name in behavior.CENSUS_COLUMNS}
        row["marital_status"] = ["Never married", "Divorced", "Widowed"][rng.integers(3)]
        row["income"] = ["- 50000.", "50000+."][int(rng.random() < 0.2)]
        row["citizenship"] = "Native- Born in U S "
        row["dividends"] = str(int(10 ** rng.uniform(0, 4)))
        row |= {"instance_weight": "1032.38", "migration_msa": "?"}
        lines.append(", ".join(change(list(row.values()), i)))
    return "\n".join(lines) + "\n"


def write_census(root, parts=("data", "test"), zipped=True, **options):
    (root / "census").mkdir(exist_ok=True, parents=True)
    for seed, part in enumerate(parts):
        content = census_lines(200 - 80 * seed, seed, **options).encode()
        path = root / "census" / f"census-income.{part}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return root / "census" / "census-income.data.gz"


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
    write_census(tmp_path / "plain", zipped=False)
    assert behavior.load("census", tmp_path / "plain").digest == data.digest
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


def put(at, word):
    """A cell of every line becomes another word."""
    return lambda cells, i: [*cells[:at], word, *cells[at:][1:]]


CENSUS_MISTAKES = [
    (lambda cells, i: cells[: 41 + (i != 4)], "income.data.gz, line 5: 41 columns, 42"),
    (put(41, "rich"), "line 1: income 'rich' is not one of"),
    (put(41, "- 50000."), "'over_50k' cannot be learnt"),
    (put(18, "many"), "line 1: dividends 'many' is not numeric"),
    (put(18, "nan"), "line 1: dividends 'nan' is not finite"),
    (put(18, "-5"), "line 1: dividends is -5.0, below 0"),
    (put(7, "never married"), "line 1: marital status 'never"),
]


@pytest.mark.parametrize("change, message", CENSUS_MISTAKES)
def test_census_mistakes_name_the_culprit(tmp_path, change, message):
    write_census(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        behavior.load("census", tmp_path)


def test_census_files_that_are_cut_off_or_unpack_without_end(tmp_path, monkeypatch):
    path = write_census(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-200])
    with pytest.raises(ValueError, match="census-income.data.gz, line .* is damaged"):
        behavior.load("census", tmp_path)
    path.write_bytes(gzip.compress(b"7" * 30_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1: has more than 1,048,576 bytes"):
        behavior.load("census", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000  # the line is not read whole
    tracemalloc.stop()
    path.write_bytes(good)
    monkeypatch.setattr(behavior, "CENSUS_LIMIT", 100)
    with pytest.raises(ValueError, match="census-income.data.gz, line 101: has more than 100 rows"):
        behavior.load("census", tmp_path)


# --- names ----------------------------------------------------------------------------------------


def test_names_and_nominal_sizes_need_no_file(tmp_path):
    for name in ("kuairand-1k", "kuairand-pure", "census"):
        data = behavior.nominal(name)
        assert not behavior.is_here(name, tmp_path) and "not here yet" in data.note
        assert data.train.ids.shape[1] == len(data.fields)
        assert data.train.labels.shape[1] == len(data.tasks)
        assert behavior.download_size(name, tmp_path) == download.DATASETS[name].size
    write_kuairand(tmp_path)
    assert set(load(tmp_path).fields) == set(behavior.nominal("kuairand-1k").fields)
    pure = download.DATASETS["kuairand-pure"].files[0]
    assert pure.checksum == "md5:0820331067a3784d9691136f772b35a7"
    with pytest.raises(ValueError, match="data is 'kuairand'; allowed: synthetic, kuairand-1k"):
        load(tmp_path, "kuairand")
    with pytest.raises(ValueError, match="hash_bits is 40"):
        load(tmp_path, hash_bits=40)
