"""Verifies a ticket's claims, by itself and against its parent. docs/ticket_format.md describes what this proves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirl_dist.config import config as configs
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.criteria import CRITERIA
from mirl_dist.pruning.partition import WHOLE, count_weights
from mirl_dist.pruning.prune import PruneConfig, form_groups, prune
from mirl_dist.pruning.quantile import single_rank
from mirl_dist.tickets.file import TicketContent
from mirl_dist.training.ticket import DENSE, Ticket

MASK_FOLLOWS = "the mask follows from the parent's weights"


class Check(NamedTuple):
    """One claim of a ticket, whether it holds (None: cannot be verified here), and the numbers behind the result."""

    what: str
    holds: bool | None
    detail: str


MAX_BLOCKS = 256
"""Limit of transformer blocks in a ticket's network, since an untrusted config could ask for any number."""


def check_size(config: configs.Config, weights: int, source: str) -> None:
    """Raise UserError, before building it, for a network that must have more than `weights` weights.

    Compares `weights` with a lower bound per model size, from the smallest tensors that it implies. This only bounds
    the cost of building an untrusted config; it does not count the weights exactly.
    """
    m = config.model
    least = {
        "dim": m.dim**2,
        "heads": max(m.heads),
        "ffn_expansion": m.ffn_expansion * m.dim**2,
        "prompt_heads": m.prompt_heads,
        "prompt_dims": max(m.prompt_dims) ** 2,
        "prompt_sizes": m.prompt_length * max(d * s**2 for d, s in zip(m.prompt_dims, m.prompt_sizes, strict=True)),
        "blocks": (sum(m.blocks) + m.refinement_blocks) * m.dim**2,
    }
    too_large = [key for key, count in least.items() if count > weights]
    if sum(m.blocks) + m.refinement_blocks > MAX_BLOCKS:
        too_large.append("blocks")
    if too_large:
        raise UserError(
            f"{source}: its model.{too_large[0]} makes a larger network than its {weights:,} weights. Get it again."
        )


def verify(content: TicketContent) -> Iterator[Check]:
    """Yield the checks of a ticket's claims against its own masks, values and config."""
    ticket, masks = content.ticket, content.masks
    yield _compare("mask digest", ticket.mask_digest, masking.digest(masks))
    yield _compare("digest of the trained weights", ticket.weights_digest, masking.digest_tensors(content.trained))
    if masking.count_surviving(masks) == masking.size(masks):  # else pruned values are missing
        yield _compare("digest of the first values", ticket.initial_digest, masking.digest_tensors(content.initial))
    yield _compare("prunable weights", ticket.prunable, masking.size(masks))
    yield _compare("alive weights", ticket.alive, masking.count_surviving(masks))
    yield _compare("weights in all", ticket.total, sum(t.numel() for t in content.trained.values()))
    densities = masking.densities(masks)
    names = sorted(densities.keys() | ticket.layer_density.keys())
    mismatched = [n for n in names if densities.get(n) != ticket.layer_density.get(n)]
    yield _check_none("density of each tensor", mismatched, f"{len(densities)} tensors")
    if ticket.collapsed or ticket.method:  # older tickets have neither field
        collapsed = [n for n in sorted(densities) if densities[n] == 0]
        yield _compare("tensors without surviving weights", ", ".join(sorted(ticket.collapsed)), ", ".join(collapsed))
    for what, weights in (("first", content.initial), ("trained", content.trained)):
        name = masking.find_nonzero_pruned(weights, masks)
        yield Check(f"dead weights are zero in the {what} values", name is None, f"not in '{name}'" if name else "all")
    yield from _verify_config(ticket, content.config)
    if ticket.protocols:
        stated = ticket.protocol in ticket.protocols.values() and ticket.also.keys() <= ticket.protocols.keys()
        yield Check("every score's protocol is stated", stated, ", ".join(ticket.protocols))


def _verify_config(ticket: Ticket, tree: dict[str, Any]) -> Iterator[Check]:
    try:
        config = configs.from_dump(tree, "the ticket file's config")
    except UserError as fault:
        yield Check("fingerprint of the config", False, str(fault))
        return
    yield _compare("fingerprint of the config", ticket.fingerprint, config.fingerprint())
    if ticket.method and config.start.ticket is None:  # a control's may depend on prune.rounds, not in the fingerprint
        yield _compare("method", ticket.method, config.method() if ticket.round else DENSE)
    if ticket.seed is not None:
        yield _compare("seed", ticket.seed, config.run.seed)


def verify_descent(content: TicketContent, parent: TicketContent, rule: PruneConfig) -> Iterator[Check]:
    """Yield the checks that a ticket follows from `parent`, the previous round of its run, by pruning with `rule`.

    parent.initial: the run's initial values, with or without those of pruned weights. parent.trained: empty if the run
    did not keep them. Without these, or if the criterion needs the network or gradients, the mask itself cannot be
    verified; then only the number of pruned weights is checked, and that none of them was restored.
    """
    child, elder = content.ticket, parent.ticket
    yield _compare("digest of the parent's ticket", child.parent, elder.digest())
    yield _compare("round", child.round, elder.round + 1)
    for what in ("fingerprint", "manifest_digest", "initial_digest"):
        yield _compare(f"{what.replace('_', ' ')} of the run", getattr(child, what), getattr(elder, what))
    yield _compare("parent's mask digest", elder.mask_digest, masking.digest(parent.masks))
    if parent.trained:
        yield _compare("parent's weights digest", elder.weights_digest, masking.digest_tensors(parent.trained))
    names = _mismatched_names(content.masks, parent.masks) or _mismatched_names(content.initial, parent.initial)
    yield _check_none("the same tensors", names, f"{len(content.initial)} tensors")
    if names:
        return
    returned = [n for n in sorted(content.masks) if bool((content.masks[n] & ~parent.masks[n]).any())]
    yield _check_none("no pruned weight returned", returned, "all masks lie inside the parent's")
    yield from _verify_cut(content, parent, rule)
    moved = []
    for name, values in sorted(content.initial.items()):
        first = parent.initial[name]
        if name in content.masks:
            first = first.masked_fill(~content.masks[name], 0.0)
        if not torch.equal(values.view(torch.int32), first.view(torch.int32)):
            moved.append(name)
    yield _check_none("survivors have the run's first values", moved, "all, to the last bit")


def _verify_cut(content: TicketContent, parent: TicketContent, rule: PruneConfig) -> Iterator[Check]:
    criterion = CRITERIA[rule.criterion]
    groups = form_groups(count_weights(parent.masks, WHOLE, single_rank), rule)
    wanted = sum(group.k for group in groups)
    removed = masking.count_surviving(parent.masks) - masking.count_surviving(content.masks)
    yield _compare("weights removed by the rule", wanted, removed)
    if criterion.needs != "nothing":
        yield Check(MASK_FOLLOWS, None, f"not provable: {rule.criterion} looks at the {criterion.needs} too")
        return
    values = parent.initial if criterion.weights_from == "initial" or rule.criterion == "random" else parent.trained
    if not values:
        yield Check(MASK_FOLLOWS, None, "not provable: the run did not keep the parent's weights")
        return
    cut = prune(values, parent.masks, rule)
    mismatched = [n for n in sorted(cut.masks) if not torch.equal(cut.masks[n], content.masks[n])]
    yield _check_none(MASK_FOLLOWS, mismatched, f"by {rule.criterion}, {rule.per}")
    yield _compare("threshold", content.ticket.threshold, cut.threshold)


def _compare(what: str, stated: object, actual: object) -> Check:
    """Return a check that the stated value equals the actual one."""
    holds = stated == actual
    return Check(what, holds, f"{actual}" if holds else f"the ticket says {stated}, found {actual}")


def _check_none(what: str, names: list[str], detail: str) -> Check:
    """Return a check that holds without names; else its detail is 'not in a, b, c and 3 more'."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Check(what, not names, f"not in {', '.join(names[:3])}{more}" if names else detail)


def _mismatched_names(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names that one side lacks or has with a different shape, sorted."""
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (one, other)]
    return sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
