"""What the fork server of forked.py imports once, so that no process that it forks has to.

Importing this module reads the text corpora, too. The process of the tests does not import it.
"""

import functools
import os
import random

import torch


def state():
    """What an import must leave alone."""
    return dict(os.environ), torch.get_num_threads(), torch.initial_seed(), random.getstate()


BEFORE = state()

import common  # noqa: E402
import kernels  # noqa: E402, F401
from data import behavior, download, graphs, images, tasks, text  # noqa: E402, F401

AFTER = state()
os.fsync = lambda descriptor: None  # as in conftest.py

import toy  # noqa: E402, F401

common.count_flops(
    lambda: torch.ones(2, 2) @ torch.ones(2, 2)
)  # torch imports half of itself at the first call
text.load_provenance = functools.cache(text.load_provenance)
for domain in text.DOMAINS:
    text.load_domain(domain)
for domain in text.PROVENANCE:
    text.load_provenance(domain)
