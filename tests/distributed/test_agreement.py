"""What ranks must have in common: a difference is named with hosts, ranks and both values."""

from __future__ import annotations

from mirl_dist.distributed.agreement import RankFacts, find_disagreement

GPU = RankFacts("node-a", "", "", "cuda", "ddp", "2.13.0+cu130", "2.29.7", "0.9")
CPU = GPU._replace(host="node-b", device="cpu", nccl="", why_cpu="Found no NVIDIA driver on your system")


def test_equal_ranks_agree() -> None:
    assert find_disagreement([GPU, GPU._replace(host="node-b")]) == ""
    assert find_disagreement([CPU, CPU._replace(why_cpu="no GPU is visible")]) == ""


def test_the_fewer_are_named_with_their_reason_and_one_of_the_others() -> None:
    assert find_disagreement([CPU, GPU, GPU, CPU._replace(host="node-c"), GPU]) == (
        "ranks differ in their device: rank 0 (node-b) has cpu (Found no NVIDIA driver on your system), rank 3 "
        "(node-c) has cpu (Found no NVIDIA driver on your system); rank 1 (node-a) has cuda. Start ranks on equal "
        "nodes, or set train.device to cpu or cuda, which names the node to mend."
    )


def test_versions_come_before_devices_and_a_fault_before_all() -> None:
    old = CPU._replace(torch="2.12.0")
    assert "differ in their version of torch: rank 1 (node-b) has 2.12.0; rank 0" in find_disagreement([GPU, old])
    faulty = old._replace(fault="found nothing, mend that.")
    assert find_disagreement([GPU, GPU, faulty]) == "rank 2 (node-b): found nothing, mend that."
    assert "version of NCCL: rank 1 (node-a) has 2.27.3;" in find_disagreement([GPU, GPU._replace(nccl="2.27.3")])


def test_of_many_differing_ranks_eight_are_named() -> None:
    text = find_disagreement([GPU] * 20 + [CPU] * 12)
    assert text.count("node-b") == 8 and " and 4 more differ; rank 0 (node-a)" in text


def test_facts_survive_the_store_and_other_versions_fields() -> None:
    assert RankFacts.from_json(GPU.to_json()) == GPU
    assert RankFacts.from_json(b'{"host": "a", "colour": "red"}') == RankFacts("a", "", "", "", "", "", "", "")
