"""The allocator: freed memory is kept for the next tensors, and returned on request."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import psutil, torch
from mirl_dist.distributed import hardware

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

page_faults()
usual = page_faults()
hardware.keep_freed_memory()
page_faults()
kept, faults = resident(), page_faults()
hardware.return_freed_memory()
print(json.dumps([usual, faults, kept - resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone returns memory this eagerly")
def test_kept_memory_needs_no_new_pages_and_can_be_returned() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    usual, faults, returned = json.loads(ended.stdout)
    assert faults < usual / 4, "at most two of eight tensors are on new pages"
    assert returned > 60 * 2**20, "a tensor of 64 MiB"
