"""Public data sets: one table, and `fetch(name)`, which downloads once, verifies, and unpacks
safely.

    python -m data.download enwik8      prints the folder with the verified files
    python -m data.download --list      names, sizes, licences, sources

A data set lies under ROOT/<name>/; ROOT is --data-dir, else $MOE_DATA, else data/cache/ of this
repository.

    url -> FILE.part -> size, checksum -> FILE -> (archives) temporary folder -> ROOT/<name>/ ->
    marker

A file put there by hand (FILE itself, or unpacked members that the table can check) passes the same
checks; one that fails is named, never overwritten. While the marker fits the table and every file's
SHA-256, no connection is opened. Archives stay, so that a lost file comes back without a network;
they may be deleted. A new data set is a new row in the table and nothing else.
"""

import argparse
import difflib
import hashlib
import http.client
import json
import os
import stat
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte before a connection counts as dead
CHUNK = 1 << 16  # bytes
MARKER = ".verified.json"
BAD_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError)
BAD_ARCHIVE += (RuntimeError,)  # zipfile: encrypted, or a compression it does not know
BAD_ARCHIVE += (
    FileExistsError,
    NotADirectoryError,
)  # `a` beside `a/b`, or beside `A` where case is ignored


class DownloadError(OSError):
    """A data set could not be had; the message is one line that says why and what to put where by
    hand.
    """


@dataclass(frozen=True)
class File:
    """One URL of a data set. Checksums are "sha256:..." or "md5:...", None where neither the
    publisher nor a well-known library states one. An archive is unpacked whole, or only the members
    that are given."""

    url: str
    size: int | None = None  # bytes over the wire
    checksum: str | None = None
    unpack: str = "none"  # none | zip | tar (also .tar.gz)
    members: dict[str, tuple[int | None, str | None]] = field(
        default_factory=dict
    )  # size, checksum
    into: str = ""  # folder for the members, below ROOT/<name>/
    limit: int = 4 << 30  # bytes that unpacking, or a download of unknown size, may write
    save_as: str = ""  # local name; "": the last part of the URL

    def path(self, folder: Path) -> Path:
        return folder / (self.save_as or self.url.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Dataset:
    """One row of the table."""

    name: str
    files: tuple[File, ...]
    licence: str
    citation: str

    @property
    def size(self) -> int | None:
        """Bytes to download; None where a file's size is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(sizes)


ENWIK8 = File(
    url="http://mattmahoney.net/dc/enwik8.zip",
    size=36_445_475,
    checksum="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    unpack="zip",
    members={"enwik8": (100_000_000, "md5:a1fa5ffddb56f4953e226637dabbb36a")},
    limit=100_000_000,
)
HETEROPHILOUS = (
    "https://raw.githubusercontent.com/yandex-research/heterophilous-graphs/{}/data/{}.npz"
)
HETEROPHILOUS_COMMIT = "a431395582e929d88271309716bea4fe24ce6318"
HETEROPHILOUS_FILES = {  # size and SHA-256 at that commit; the larger files were not at hand
    "actor": (252_956, "c350eef06b2c2a9bf8218be2b57cac6d4003d0922eb597a039e9123f75817816"),
    "chameleon_filtered": (
        58_924,
        "bf46f07e1fb5249280447e5fe3100f3e82fc4b93ad1e13ffcfdec924b6ac0bb5",
    ),
    "squirrel_filtered": (
        208_215,
        "f06370ffb3116c5de8b7a600005400b2293c025e0ce2f6916d8201a825505ac7",
    ),
    "minesweeper": (135_045, "e664c8dacf1e8ac466c2c09ed4b237bd2c5541f47a6eae9c6092cb87f16412b3"),
    "tolokers": (1_329_769, "dacf3ac94cec53d03cd2adb5255c08b33dee1656c33ca8164a464bd9450a1667"),
    "roman_empire": (None, None),
    "amazon_ratings": (None, None),
    "questions": (None, None),
}
LINKX_COMMIT = "82f8f05c5c3ec16bd5b505cc7ad62ab5e09051e6"
LINKX = f"https://raw.githubusercontent.com/CUAI/Non-Homophily-Large-Scale/{LINKX_COMMIT}/data/"
PENN94_SPLITS = File(  # size and SHA-256 at that commit
    url=f"{LINKX}splits/fb100-Penn94-splits.npy",
    size=581_866,
    checksum="sha256:88a1060358482d8e25b978ab59c4ff71771388cd5ffac3dd775a3cd9dc85b032",
)
TWITCH_SPLITS = File(
    url=f"{LINKX}splits/twitch-gamer-splits.npy",
    size=3_548_331,
    checksum="sha256:1983107bf72a28f3933d050489434798030967d571be10a8ace1474ba2c5665d",
)
LINKX_CITATION = "Lim et al. 2021, Large Scale Learning on Non-Homophilous Graphs"
OGB = "https://snap.stanford.edu/ogb/data/nodeproppred/"
GRAPHS = (
    *(
        Dataset(
            name=name,
            files=(
                File(
                    HETEROPHILOUS.format(HETEROPHILOUS_COMMIT, name), size, sha and f"sha256:{sha}"
                ),
            ),
            licence="MIT",
            citation="Platonov et al. 2023, A Critical Look at the Evaluation of GNNs "
            "under Heterophily",
        )
        for name, (size, sha) in HETEROPHILOUS_FILES.items()
    ),
    Dataset(
        name="ogbn-arxiv",
        files=(File(f"{OGB}arxiv.zip", unpack="zip"),),
        licence="ODC-BY",
        citation="Hu et al. 2020, Open Graph Benchmark",
    ),
    Dataset(
        name="ogbn-products",
        files=(File(f"{OGB}products.zip", unpack="zip", limit=16 << 30),),
        licence="Amazon's",
        citation="Hu et al. 2020, Open Graph Benchmark",
    ),
    Dataset(
        name="penn94",
        files=(File(f"{LINKX}facebook100/Penn94.mat"), PENN94_SPLITS),
        licence="none stated",
        citation=LINKX_CITATION,
    ),
    Dataset(
        name="twitch-gamer",
        files=(
            File("https://snap.stanford.edu/data/twitch_gamers.zip", unpack="zip"),
            TWITCH_SPLITS,
        ),
        licence="none stated",
        citation=f"Rozemberczki, Sarkar 2021, Twitch Gamers; splits: {LINKX_CITATION}",
    ),
)


def kuairand(version: str, md5: str) -> File:
    """Without the statistics file, 3 GB in KuaiRand-1K, and without the randomly exposed videos."""
    stems = (
        "log_standard_4_08_to_4_21",
        "log_standard_4_22_to_5_08",
        "user_features",
        "video_features_basic",
    )
    return File(
        url=f"https://zenodo.org/records/10439422/files/KuaiRand-{version}.tar.gz",
        checksum=f"md5:{md5}",
        unpack="tar",
        members={
            f"KuaiRand-{version}/data/{stem}_{version.lower()}.csv": (None, None) for stem in stems
        },
    )


CENSUS_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/census-income-mld"
KUAIRAND = {"licence": "CC BY-SA 4.0", "citation": "Gao et al., KuaiRand, CIKM 2022"}
CIFAR100 = File(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168_513_733,
    checksum="md5:03b5dce01913d631647c71ecec9e9cb8",
    unpack="tar",
    members={
        "cifar-100-binary/train.bin": (153_700_000, None),
        "cifar-100-binary/test.bin": (30_740_000, None),
    },
    limit=184_440_000,
)
CIFAR10 = File(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    unpack="tar",
    members={
        f"cifar-10-batches-bin/{name}.bin": (30_730_000, None)
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    },
    limit=184_380_000,
)
CIFAR_CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)"
SVAMP_COMMIT = "689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
SVAMP = f"https://raw.githubusercontent.com/arkilpatel/SVAMP/{SVAMP_COMMIT}/data/"
SVAMP_FILES = {  # size and SHA-256 at that commit
    "cv_asdiv-a/fold0/train.csv": (
        419_240,
        "5c711c9150712141bfde68abf5ee4aecb610563325901320aef41e1e5ecf6c84",
    ),
    "cv_asdiv-a/fold0/dev.csv": (
        96_533,
        "0813a90f336147b1229a6d1d133c29f7e585cb27cafd651976bb94449a4b81c0",
    ),
    "cv_asdiv-a/fold1/train.csv": (
        417_474,
        "77046a465a3e693b4b241dcbce2fe2cba7c9d3d253201e5e125273f6f95ade8a",
    ),
    "cv_asdiv-a/fold1/dev.csv": (
        98_299,
        "2432c24452fceb43c76f081342ebcd0e7b0f5776cb2908e621eeb4e2fad3cd17",
    ),
    "cv_asdiv-a/fold2/train.csv": (
        407_897,
        "25a7e1b542fb6c39181ab6005ec9e1eb68d049f0ca4367c87837d299feef3cd8",
    ),
    "cv_asdiv-a/fold2/dev.csv": (
        107_876,
        "63da38010296031a123c0bd9cb80701870f1e31fdf06a88442b3ab6500b36b84",
    ),
    "cv_asdiv-a/fold3/train.csv": (
        410_436,
        "618e38871a3b82b184f47c301cae011b16ba1d0d2062017e51899490d071d846",
    ),
    "cv_asdiv-a/fold3/dev.csv": (
        105_337,
        "7a45f3d18353e4ea8ffa2d1cb238e80068ad3bb5dbed4303231b3af0836d78e2",
    ),
    "cv_asdiv-a/fold4/train.csv": (
        407_820,
        "caf82cc29dafe77dda0aac8bf8af5c363c666e0e1480fbaedc47c504384b76fa",
    ),
    "cv_asdiv-a/fold4/dev.csv": (
        107_953,
        "b9fe1aacddc34ec2caed5e0c35faff2681198431b021d13e16dc2e7c61ec6ecb",
    ),
    "cv_mawps/fold0/train.csv": (
        595_844,
        "0674253e6099813cefbb1d6eae3d2dc784ab6ebfdaf8755f6ebb4b99fc1f6ebe",
    ),
    "cv_mawps/fold0/dev.csv": (
        148_020,
        "bad59cff796b01a87363ea970f1fa80c15f56ff5f4388143aadbdc3feaf5f990",
    ),
    "cv_mawps/fold1/train.csv": (
        593_821,
        "ad8846861202060f2dfcb8423d23218cbf6a4a67010d4d4d939b9df61b2d34b0",
    ),
    "cv_mawps/fold1/dev.csv": (
        150_043,
        "31362cb8741f9fc11b470b224478902ae27ab762bdd82bcb08a9c945d5947422",
    ),
    "cv_mawps/fold2/train.csv": (
        593_895,
        "b137a07367e1b3cd9556fae7b9e17fb5e23836e1e6dc9357719049ebc8860c62",
    ),
    "cv_mawps/fold2/dev.csv": (
        149_969,
        "fae4f08a24a23123612ca5bb960e4f9aa7202c856344a59ab7adea424dfc670d",
    ),
    "cv_mawps/fold3/train.csv": (
        597_305,
        "fb1e286a94feed24a41c5560095e21a33d61888c7c27a355e6ccef725deaf084",
    ),
    "cv_mawps/fold3/dev.csv": (
        146_559,
        "5ac76e5559cdde0aa8bcac77eb9af46b9b0230f00661ad0257dbd58a1567a323",
    ),
    "cv_mawps/fold4/train.csv": (
        594_735,
        "9194364265a42e0f146cc73f514c806c5d322827cd025a474ded33af076837bb",
    ),
    "cv_mawps/fold4/dev.csv": (
        149_129,
        "1bb9164e6ba93fdc1bffddd8544c20cddc3c195a299b0b6c6893c2a760c3434b",
    ),
    "mawps-asdiv-a_svamp/train.csv": (
        1_242_909,
        "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821",
    ),
    "mawps-asdiv-a_svamp/dev.csv": (
        467_974,
        "978425fa0820a147a20d3cb305a571d77b8ba0d1ccec4a96dd1470bf0079c338",
    ),
}
CSQA = "https://s3.amazonaws.com/commensenseqa/"  # the publisher's spelling
CSQA_FILES = {  # checksums as ParlAI states them
    "train_rand_split.jsonl": (
        3_785_890,
        "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
    ),
    "dev_rand_split.jsonl": (
        471_653,
        "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
    ),
}
SST2 = File(
    url="https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
    checksum="md5:9f81648d4199384278b86e315dac217c",  # as torchtext states it
    unpack="zip",
    members={"SST-2/train.tsv": (None, None), "SST-2/dev.tsv": (None, None)},
    limit=100_000_000,
)
MRPC = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_DEV = "https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
SQUAD_FILES = {  # sizes and checksums as TensorFlow Datasets states them
    "train-v1.1.json": (
        30_288_272,
        "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    ),
    "dev-v1.1.json": (
        4_854_279,
        "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    ),
}
HOTPOTQA = "http://curtis.ml.cmu.edu/datasets/hotpot/"
HOTPOTQA_FILES = {  # checksums as ParlAI states them
    "hotpot_train_v1.1.json": (
        566_426_227,
        "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    ),
    "hotpot_dev_distractor_v1.json": (
        46_320_117,
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
    ),
}
SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
ARC = "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip"
ARC_FILES = [
    f"ARC-V1-Feb2018-2/ARC-{kind}-{part}.jsonl"
    for kind in ("Challenge/ARC-Challenge", "Easy/ARC-Easy")
    for part in ("Train", "Dev")
]
OBQA = "https://ai2-public-datasets.s3.amazonaws.com/open-book-qa/OpenBookQA-V1-Sep2018.zip"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
WIKIQA_ID = "E5FCFCEE-7005-4814-853D-DAA7C66507E0"
WIKIQA = f"https://download.microsoft.com/download/E/5/F/{WIKIQA_ID}/WikiQACorpus.zip"


def _zip(url: str, *members: str) -> File:
    """An archive whose publisher states neither size nor checksum."""
    return File(
        url, unpack="zip", members={name: (None, None) for name in members}, limit=200_000_000
    )


def _mosaic(task: str) -> File:
    """Questions and labels of training and development set, as AllenAI's Mosaic group packs
    them.
    """
    names = (
        f"{task}-train-dev/{part}{end}"
        for part in ("train", "dev")
        for end in (".jsonl", "-labels.lst")
    )
    return _zip(
        f"https://storage.googleapis.com/ai2-mosaic/public/{task}/{task}-train-dev.zip", *names
    )


def _plain(root: str, files: dict[str, tuple[int, str]]) -> tuple[File, ...]:
    return tuple(
        File(root + name, size, f"sha256:{sha}", save_as=name)
        for name, (size, sha) in files.items()
    )


TABLE = (
    Dataset(
        name="enwik8",
        files=(ENWIK8,),
        licence="text of Wikipedia, CC BY-SA / GFDL",
        citation="Matt Mahoney, Large Text Compression Benchmark",
    ),
    *GRAPHS,
    Dataset("kuairand-1k", (kuairand("1K", "6b0b9c8222d67fcd4c676218edca3f1f"),), **KUAIRAND),
    Dataset("kuairand-pure", (kuairand("Pure", "0820331067a3784d9691136f772b35a7"),), **KUAIRAND),
    Dataset(
        name="census",
        files=tuple(
            File(f"{CENSUS_URL}/census-income.{part}.gz", limit=64 << 20)
            for part in ("data", "test")
        ),
        licence="CC BY 4.0",
        citation="Census-Income (KDD), UCI Machine Learning Repository, 2000",
    ),
    Dataset(name="cifar100", files=(CIFAR100,), licence="none stated", citation=CIFAR_CITATION),
    Dataset(name="cifar10", files=(CIFAR10,), licence="none stated", citation=CIFAR_CITATION),
    Dataset(
        name="sst2",
        files=(SST2,),
        licence="research use",
        citation="Socher et al. 2013, Stanford Sentiment Treebank; GLUE, Wang et al. 2019",
    ),
    Dataset(
        name="mrpc",
        files=(
            File(MRPC, save_as="msr_paraphrase_train.txt"),
            File(MRPC_DEV, save_as="mrpc_dev_ids.tsv"),
        ),
        licence="Microsoft Research data licence",
        citation="Dolan and Brockett 2005, Microsoft Research Paraphrase Corpus; "
        "split of GLUE, Wang et al. 2019",
    ),
    Dataset(
        name="copa",
        files=(_zip(SUPERGLUE + "COPA.zip", "COPA/train.jsonl", "COPA/val.jsonl"),),
        licence="BSD-2",
        citation="Roemmele et al. 2011, COPA; SuperGLUE, Wang et al. 2019",
    ),
    Dataset(
        name="multirc",
        files=(_zip(SUPERGLUE + "MultiRC.zip", "MultiRC/train.jsonl", "MultiRC/val.jsonl"),),
        licence="research use",
        citation="Khashabi et al. 2018, MultiRC; SuperGLUE, Wang et al. 2019",
    ),
    Dataset(
        name="winogrande",
        files=(
            _zip(
                "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
                "winogrande_1.1/train_l.jsonl",
                "winogrande_1.1/dev.jsonl",
            ),
        ),
        licence="CC BY",
        citation="Sakaguchi et al. 2020, WinoGrande",
    ),
    Dataset(
        name="arc",
        files=(
            replace(
                _zip(ARC, *ARC_FILES), limit=2_000_000_000
            ),  # most of it is a corpus, which stays packed
        ),
        licence="CC BY-SA",
        citation="Clark et al. 2018, AI2 Reasoning Challenge",
    ),
    Dataset(
        name="obqa",
        files=(
            _zip(
                OBQA,
                *(
                    f"OpenBookQA-V1-Sep2018/Data/Main/{part}.jsonl"
                    for part in ("train", "dev", "test")
                ),
            ),
        ),
        licence="see allenai.org/data/open-book-qa",
        citation="Mihaylov et al. 2018, OpenBookQA",
    ),
    Dataset(
        name="siqa",
        files=(_mosaic("socialiqa"),),
        licence="CC BY",
        citation="Sap et al. 2019, SocialIQA",
    ),
    Dataset(
        name="piqa",
        files=(_mosaic("physicaliqa"),),
        licence="AFL 3.0",
        citation="Bisk et al. 2020, PIQA",
    ),
    Dataset(
        name="hellaswag",
        files=tuple(
            File(HELLASWAG + name, save_as=name)
            for name in ("hellaswag_train.jsonl", "hellaswag_val.jsonl")
        ),
        licence="MIT",
        citation="Zellers et al. 2019, HellaSwag",
    ),
    Dataset(
        name="wikiqa",
        files=(_zip(WIKIQA, "WikiQACorpus/WikiQA-train.tsv", "WikiQACorpus/WikiQA-dev.tsv"),),
        licence="Microsoft Research data licence",
        citation="Yang et al. 2015, WikiQA",
    ),
    Dataset(
        name="squad",
        files=_plain(SQUAD, SQUAD_FILES),
        licence="CC BY-SA 4.0",
        citation="Rajpurkar et al. 2016, SQuAD 1.1",
    ),
    Dataset(
        name="hotpotqa",
        files=_plain(HOTPOTQA, HOTPOTQA_FILES),
        licence="CC BY-SA 4.0",
        citation="Yang et al. 2018, HotpotQA",
    ),
    Dataset(
        name="csqa",
        files=_plain(CSQA, CSQA_FILES),
        licence="MIT",
        citation="Talmor et al. 2019, CommonsenseQA",
    ),
    Dataset(
        name="svamp",
        files=_plain(SVAMP, SVAMP_FILES),
        licence="MIT",
        citation="Patel et al. 2021, SVAMP; with ASDiv-A (Miao et al. 2020) and "
        "MAWPS (Koncel-Kedziorski et al. 2016)",
    ),
)
DATASETS = {dataset.name: dataset for dataset in TABLE}


def root(data_dir: str | Path | None = None) -> Path:
    """Where data sets lie: data_dir, else $MOE_DATA, else data/cache/ of this repository."""
    given = data_dir or os.environ.get("MOE_DATA") or Path(__file__).resolve().parent / "cache"
    return Path(given).expanduser()


def fetch(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder with the verified files of a data set; downloads what is missing."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown data set {name!r}; the nearest is {near}, --list shows all")
    folder, files = root(data_dir) / name, DATASETS[name].files
    # In the marker, so that a corrected row is checked anew.
    table = hashlib.sha256(repr(files).encode()).hexdigest()
    if _is_verified(folder, table):
        return folder
    file, digests = files[0], {}
    try:
        for file in files:
            for path in _obtain(file, folder):
                digests[path.relative_to(folder).as_posix()] = _digest(path, "sha256")
        part = Path(f"{folder / MARKER}.part")
        part.write_text(json.dumps({"table": table, "sha256": digests}))
        os.replace(part, folder / MARKER)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(_reason(error).split())
        by_hand = f"Run again, or put {file.url} at {file.path(folder)} by hand"
        raise DownloadError(f"{name}: {reason}. {by_hand}") from error
    return folder


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # URLError wraps what happened
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(cause, TimeoutError):
        return f"the server sent nothing for {TIMEOUT} s"
    if isinstance(error, urllib.error.URLError | http.client.HTTPException | ConnectionError):
        return f"no connection to the server ({cause or type(error).__name__})"
    return str(error)


def _is_verified(folder: Path, table: str) -> bool:
    """Whether the files are, byte for byte, those that were fetched and checked for this row."""
    if not (folder / MARKER).is_file():
        return False
    try:
        marker = json.loads((folder / MARKER).read_text())
        known = marker["sha256"].items()
        unchanged = all(_digest(folder / path, "sha256") == digest for path, digest in known)
        return unchanged and marker["table"] == table
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # a file is gone, or this is no marker of ours


def _digest(path: Path, algorithm: str) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise DownloadError(f"{path} is no regular file; delete it first")
    with open(path, "rb") as stream:
        return hashlib.file_digest(
            stream, partial(hashlib.new, algorithm, usedforsecurity=False)
        ).hexdigest()


def _check(
    path: Path, size: int | None, checksum: str | None, remedy: str = "delete it first"
) -> None:
    actual = path.stat().st_size
    if size not in (None, actual):
        raise DownloadError(f"{path} has {actual:,} bytes, not {size:,}; {remedy}")
    if checksum:
        algorithm, wanted = checksum.split(":")
        found = _digest(path, algorithm)
        if found != wanted:
            raise DownloadError(f"{path} has {algorithm} {found}, not {wanted}; {remedy}")


def _obtain(file: File, folder: Path) -> list[Path]:
    """One file of the table, verified and in place: the path of the plain file, or of every
    member.
    """
    target = file.path(folder)
    known = {folder / file.into / name: check for name, check in file.members.items() if any(check)}
    if known and len(known) == len(file.members) and all(path.is_file() for path in known):
        for path, check in known.items():
            _check(path, *check)
        return list(known)
    if target.is_file():
        _check(target, file.size, file.checksum)
    else:
        _download(file, target)
    return [target] if file.unpack == "none" else _unpack(file, target, folder)


def _download(file: File, target: Path) -> None:
    """url -> FILE.part -> checks -> FILE. Resumes where a checksum would notice two versions
    joined.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{target}.part")
    if part.is_fifo():
        raise DownloadError(f"{part} is a pipe; delete it first")
    offset = part.stat().st_size if file.checksum and part.exists() else 0
    if file.size is not None and offset > file.size:
        offset = 0
    if not offset or offset != file.size:
        _receive(file, part, offset)
    try:
        _check(part, file.size, file.checksum, "it is deleted now")
    except DownloadError:
        part.unlink()
        raise
    os.replace(part, target)


def _receive(file: File, part: Path, offset: int) -> None:
    """Write FILE.part from offset on, and believe no size that the server announces."""
    headers = {"User-Agent": "data.download"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # nothing follows: complete, or the checksum will tell
            return
        raise
    with response:
        offset = (
            offset if response.status == 206 else 0
        )  # 200: a server that ignores Range sends all of it
        length = response.headers.get("Content-Length", "")
        announced = offset + int(length) if length.isdecimal() else file.size
        if file.size not in (None, announced):
            raise DownloadError(
                f"the server announces {announced:,} bytes, the table says {file.size:,}"
            )
        most = file.limit if file.size is None else file.size
        bar = tqdm(
            total=announced, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with bar, open(part, "ab" if offset else "wb") as out:
            while offset <= most and (chunk := response.read(CHUNK)):
                offset += out.write(chunk)
                bar.update(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if offset > most:
        part.unlink()
        raise DownloadError(f"the server sends more than {most:,} bytes")
    if offset < (announced or 1):
        raise DownloadError(f"the connection ended after {offset:,} of {announced or 1:,} bytes")


class _Header(tarfile.TarInfo):
    """A tar header that is not a file is read into memory whole; a crafted one would ask for
    gigabytes.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type not in tarfile.REGULAR_TYPES and header.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _entries(archive: Path, unpack: str) -> Iterator[tuple]:
    """(name, is a file, is a folder, function that opens it) for everything in an archive."""
    if unpack == "zip":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0: not written on Unix
                yield (
                    info.filename,
                    kind in (0, stat.S_IFREG),
                    info.is_dir(),
                    partial(opened.open, info),
                )
    else:
        with tarfile.open(archive, "r|*", tarinfo=_Header) as opened:
            for info in opened:
                yield info.name, info.isreg(), info.isdir(), partial(opened.extractfile, info)


def _unpack(file: File, archive: Path, folder: Path) -> list[Path]:
    """Archive -> temporary folder -> checks -> folder: what is refused leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
        try:
            names = _write_members(file, archive, Path(temporary))
        except (*BAD_ARCHIVE, DownloadError) as error:
            raise DownloadError(f"{archive} is refused, delete it first: {error}") from error
        for name in names:
            (folder / file.into / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / name, folder / file.into / name)
    return [folder / file.into / name for name in names]


def _write_members(file: File, archive: Path, temporary: Path) -> set[str]:
    """What the archive holds, checked name by name and byte by byte; headers say what their writer
    liked.
    """
    names, written = set(), 0
    for name, is_file, is_folder, opener in _entries(archive, file.unpack):
        path = PurePosixPath(name)
        inside = str(path)  # one spelling of x/a, x//./a
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\\" in name:
            raise DownloadError(f"{name!r} is not a name inside the folder")
        if not (is_file or is_folder) or not name.isprintable():
            raise DownloadError(f"{name!r} is a link, a device or has a strange name")
        if is_folder or (file.members and inside not in file.members):
            continue
        if inside in names or inside in (MARKER, archive.name):
            raise DownloadError(f"{name!r} is there twice, or is the name of a file kept here")
        names.add(inside)
        target = temporary / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        with opener() as stream, open(target, "xb") as out:
            while chunk := stream.read(CHUNK):
                written += len(chunk)
                if written > file.limit:
                    raise DownloadError(f"it unpacks to more than {file.limit:,} bytes")
                out.write(chunk)
        _check(target, *file.members.get(inside, (None, None)), "it is not put in place")
    if missing := set(file.members) - names or (not names and {"any file"}):
        raise DownloadError(f"it lacks {', '.join(sorted(missing))}")
    return names


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code: 1 failed, 2 unknown name, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m data.download", description="Download and verify a data set."
    )
    parser.add_argument("name", nargs="?", help="one of --list")
    parser.add_argument("--data-dir", help="root folder (default: $MOE_DATA, else data/cache/)")
    parser.add_argument("--list", action="store_true", help="show the data sets and stop")
    arguments = parser.parse_args(argv)
    if not arguments.list and arguments.name is None:
        parser.error("name a data set, or use --list")
    for dataset in DATASETS.values() if arguments.list else ():
        size = "size not known" if dataset.size is None else f"{dataset.size:,} bytes"
        urls = " ".join(file.url for file in dataset.files)
        print(f"{dataset.name}: {size}; {dataset.licence}; {dataset.citation}; {urls}")
    try:
        if not arguments.list:
            print(fetch(arguments.name, arguments.data_dir))
        return 0
    except (DownloadError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, DownloadError) else 2
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept, run again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
