"""What the fork server of forked.py imports once, so that no process that it forks has to.

Importing this module reads the text corpora, too. Tests do not import it.
"""

import functools

import torch
import toy  # noqa: F401

import common
import kernels  # noqa: F401
from data import behavior, download, graphs, images, tasks, text  # noqa: F401

common.count_flops(lambda: torch.ones(2, 2) @ torch.ones(2, 2))  # torch imports half of itself at the first call
text.load_domain = functools.cache(text.load_domain)
text.load_provenance = functools.cache(text.load_provenance)
for domain in text.DOMAINS:
    text.load_domain(domain)
for domain in text.PROVENANCE:
    text.load_provenance(domain)
