"""A node finds its own address, and the interface through which the ranks' libraries then talk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirl_dist.distributed.launch import launcher
from mirl_dist.distributed.launch.launch_file import LaunchFile


def test_gloo_and_nccl_use_the_interface_to_node_0_unless_told_another(monkeypatch: pytest.MonkeyPatch) -> None:
    file = LaunchFile(Path("x"), 2, 2, 1, 1, "ddp", False, "static", "127.0.0.1", 29500)
    monkeypatch.setattr(launcher.os, "environ", {"NCCL_SOCKET_IFNAME": "ib"})
    assert launcher._find_own_address(file) == "127.0.0.1"
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib"}
    del os.environ["NCCL_SOCKET_IFNAME"]
    launcher._find_own_address(file)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
