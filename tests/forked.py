"""What the fork server of test_hard_knocks.py imports once: a script then starts in milliseconds instead of seconds.

Importing this module reads the text corpora, too. Tests do not import it.
"""

import functools

import test_hard_knocks  # noqa: F401
import torch

import common
import kernels  # noqa: F401
from data import text

common.count_flops(lambda: torch.ones(2, 2) @ torch.ones(2, 2))  # torch imports half of itself at the first call
text.load_domain = functools.cache(text.load_domain)
text.load_provenance = functools.cache(text.load_provenance)
for domain in text.DOMAINS:
    text.load_domain(domain)
for domain in text.PROVENANCE:
    text.load_provenance(domain)
