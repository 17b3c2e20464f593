"""Two nodes, each a network of its own with a name of its own: a link that is cut, a stop that is asked of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import ROOT, Lab
from tests.services.processes import wait_until

SETS = {"train.epochs": 8, "prune.rounds": 1, "ranks.timeout_seconds": 5}
SETS |= {"store.lease_seconds": 5, "store.patience_seconds": 2}
WAITED = [f"mirl-dist, rank {rank} (node-{rank}): waited " for rank in (0, 1)]


def root(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


class Node:
    """A network namespace with one end of a cable; commands in it see the host name node-<number>."""

    def __init__(self, number: int) -> None:
        self.number, self.address = number, f"10.213.77.{number + 1}"
        self.name, self.cable = f"mirl-{os.getpid()}-{number}", f"mirl{os.getpid() % 10**6}n{number}"

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def command(self, *command: str) -> list[str]:
        name = f'hostname node-{self.number}; exec "$@"'
        return self.inside("unshare", "--uts", "sh", "-c", name, "sh", *command)

    def plug_in(self) -> None:
        root(*self.inside("ip", "link", "set", "lo", "up"))
        root(*self.inside("ip", "address", "add", f"{self.address}/24", "dev", self.cable))
        root(*self.inside("ip", "link", "set", self.cable, "up"))

    def drop(self, packets: bool) -> None:
        """Lose all packets to and from here without a word, as a broken switch does; or lose no more."""
        change = "--insert" if packets else "--delete"
        root(*self.inside("iptables", change, "INPUT", "-i", self.cable, "-j", "DROP"))
        root(*self.inside("iptables", change, "OUTPUT", "-o", self.cable, "-j", "DROP"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes with a cable between them."""
    tools = [tool for tool in ("ip", "iptables", "unshare") if shutil.which(tool) is None]
    if tools or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and ip, iptables and unshare (apt: iproute2 iptables util-linux)")
    made = [Node(0), Node(1)]
    try:
        for node in made:
            root("ip", "netns", "add", node.name)
        ends = [("name", node.cable, "netns", node.name) for node in made]
        root("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node in made:
            node.plug_in()
        root(*made[0].command("true"))
        made[1].drop(True)
        made[1].drop(False)
    except (subprocess.CalledProcessError, OSError) as error:
        remove(made)
        pytest.skip(f"this machine lets root make no network namespaces: {getattr(error, 'stderr', error)}")
    yield made
    remove(made)


def remove(nodes: list[Node]) -> None:
    for node in nodes:
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            root("ip", "netns", "delete", node.name)


class Launch:
    """`mirl-dist train --launch` with one file, on each of two nodes."""

    def __init__(self, lab: Lab, nodes: list[Node], folder: Path, backend: str, port: int, sets: Mapping[str, Any]):
        folder.mkdir()
        self.run = folder / "run"
        tree = {"distributed_type": "MULTI_GPU", "num_machines": 2, "num_processes": 2, "rdzv_backend": backend}
        (folder / "launch.yaml").write_text(json.dumps(tree | {"main_process_port": port}))
        arguments = lab.train(folder, sets, "--launch", str(folder / "launch.yaml"))
        self._started = []
        for node in nodes:
            place = {"MIRL_NODE_RANK": str(node.number), "MIRL_MASTER_ADDR": nodes[0].address, "PYTHONPATH": str(ROOT)}
            (own := folder / f"tmp-{node.number}").mkdir()
            command = ("python", "-m", "mirl_dist", *arguments)
            env = place | {"TMPDIR": str(own)}
            self._started.append(lab.cold(*command, cwd=folder, env=env, through=node.command()))

    def text(self, number: int, kind: str = "err") -> str:
        return self._started[number].text(kind)

    def said(self) -> str:
        return "\n".join(f"--- node {n}, {kind}\n{self.text(n, kind)}" for n in (0, 1) for kind in ("out", "err"))

    def pid(self, number: int) -> int:
        """Of the launcher: each command on the way to it has become the next one."""
        return self._started[number].pids[0]

    def until(self, reached: Callable[[], Any]) -> None:
        wait_until(reached, hopeless=lambda: any(one.codes() != [None] for one in self._started), said=self.said)

    def wait(self) -> list[int]:
        return [one.wait().rc for one in self._started]

    def kill(self) -> None:
        for one in self._started:
            one.kill()

    def log(self, rank: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / f"logs/rank-{rank:04d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cut(lab: Lab, nodes: list[Node], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    """Launches that lost the link between their nodes in the middle of training, until all ranks were started again;
    both at once, for they mostly wait."""
    folder = tmp_path_factory.mktemp("nodes")
    kinds = {"static": 29511, "c10d": 29512}
    launches = {kind: Launch(lab, nodes, folder / kind, kind, port, SETS) for kind, port in kinds.items()}
    with contextlib.ExitStack() as ends:
        for launch in launches.values():
            ends.callback(launch.kill)
        for launch in launches.values():
            launch.until(partial(committed, launch))
        nodes[1].drop(True)
        try:
            for launch in launches.values():
                launch.until(partial(lost, launch))
        finally:
            nodes[1].drop(False)
        for launch in launches.values():
            assert launch.wait() == [0, 0], launch.said()
    return launches


def committed(launch: Launch) -> bool:
    return any(launch.run.glob("rounds/00/steps/*/COMPLETE.json"))


def lost(launch: Launch) -> bool:
    """Whether all ranks have missed the others, and those of node 0 are being started again. (Under c10d node 1 is not:
    its launcher asks node 0 first.)"""
    return WAITED[0] in launch.text(0) and WAITED[1] in launch.text(1) and "again (1 of 3)" in launch.text(0)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    lab.play(folder, SETS).ok()
    return folder / "run"


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_a_run_whose_nodes_lost_each_other_goes_on_by_itself_to_the_same_tickets(
    lab: Lab, cut: dict[str, Launch], undisturbed: Path, kind: str
) -> None:
    launch = cut[kind]
    assert "resuming: round 0, after step " in launch.text(0, "out"), launch.said()
    lab.assert_same_run(launch.run, undisturbed)


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_ranks_that_lost_each_other_say_who_is_missing_and_on_which_node(cut: dict[str, Launch], kind: str) -> None:
    launch = cut[kind]
    first, second = launch.text(0), launch.text(1)
    assert WAITED[0] in first, launch.said()
    assert "; rank 1 (node-1, pid " in first and "or its node is down" in first
    assert "mirl-dist, node 0 (node-0): rank 0 " in first
    assert WAITED[1] in second
    assert "through which ranks share their state, no longer responds" in second
    if kind == "static":
        assert "mirl-dist, node 1 (node-1): rank 1 " in second
    assert "Traceback" not in first + second and "C++" not in first + second


def test_the_logs_of_all_ranks_on_all_nodes_tell_the_whole_story(cut: dict[str, Launch]) -> None:
    launch = cut["static"]
    for rank in (0, 1):
        lines = launch.log(rank)
        assert {line["host"] for line in lines} == {f"node-{rank}"} and {line["rank"] for line in lines} == {rank}
        assert [line["text"][:7] for line in lines].count("started") == 2, "both starts, in one file"
        (missed,) = [line for line in lines if WAITED[rank] in line["text"]]
        assert missed["level"] == "warning" and missed["phase"] in ("training", "committing")
        assert any(line["text"].startswith("round 1: 24/24") for line in lines)


def test_a_stop_that_is_asked_of_one_node_ends_all_of_them_resumably(
    lab: Lab, nodes: list[Node], tmp_path: Path
) -> None:
    launch = Launch(lab, nodes, tmp_path / "stop", "static", 29513, SETS | {"train.epochs": 4000})
    try:
        launch.until(partial(committed, launch))
        os.kill(launch.pid(1), signal.SIGTERM)
        assert launch.wait() == [75, 75], launch.said()
    finally:
        launch.kill()
    assert "mirl-dist, node 1 (node-1): SIGTERM: the ranks were asked to stop" in launch.text(1)
    assert launch.text(0).count("stopped on request in round 0") == 1 and "again (1 of" not in launch.said()
