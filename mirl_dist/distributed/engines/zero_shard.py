"""This rank's shard of DeepSpeed's flat float32 tensors: slices by parameter name, their gradients and moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.base import MOMENTS


class _OwnedSlice(NamedTuple):
    """The owned part of a parameter: `length` elements of `flat` from `begin` on.

    first: flat index of the part in the whole parameter.
    """

    flat: Tensor
    begin: int
    length: int
    first: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.begin, self.length)


class ZeroShard:
    """This rank's shard of the float32 weights under ZeRO, with its gradients and moments.

    DeepSpeed keeps everything that a rank owns in one flat tensor and passes that to the optimiser; each parameter is a
    slice of it.
    """

    def __init__(self, network: nn.Module, deepspeed_optimizer: Any, stage: int, *, offloaded: bool) -> None:
        """network: already initialised by DeepSpeed. stage: ZeRO stage, 1 to 3. offloaded: moments in host memory."""
        self._deepspeed = deepspeed_optimizer
        self._optimizer: Any = deepspeed_optimizer.optimizer
        self._stage, self._offloaded = stage, offloaded
        self._parameters: dict[str, Any] = dict(network.named_parameters())
        self._slices = {name: self._find_slice(p) for name, p in self._parameters.items()}

    def _find_slice(self, parameter: Any) -> _OwnedSlice:
        """Return a parameter's slice. In stage 3 its length includes the padding at the end of a rank's part."""
        if self._stage == 3:
            group, begin, length = self._deepspeed.grad_position[self._deepspeed.get_param_id(parameter)]
            return _OwnedSlice(self._deepspeed.fp32_partitioned_groups_flat[group], begin, length, 0)
        flat = self._deepspeed.single_partition_of_fp32_groups[0]
        mapping = parameter._hp_mapping
        if mapping is None:  # the parameter is owned entirely by other ranks
            return _OwnedSlice(flat, 0, 0, 0)
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _OwnedSlice(flat, inside.start, inside.numel, whole.start)

    def lengths(self) -> list[int]:
        """Return the slice lengths in parameter order."""
        return [owned.length for owned in self._slices.values()]

    def drop_padding(self, lengths: Mapping[str, int]) -> None:
        """Shorten each slice to its length without padding."""
        self._slices = {name: owned._replace(length=lengths[name]) for name, owned in self._slices.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's live weights: its slices in stage 3, otherwise whole parameters."""
        if self._stage == 3:
            return {name: owned.of(owned.flat.detach()) for name, owned in self._slices.items()}
        return {name: p.detach() for name, p in self._parameters.items()}

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` to DeepSpeed's second copy: parameter partitions in stage 3, else the flat float32 tensor."""
        for name, parameter in self._parameters.items():
            owned = self._slices[name]
            if self._stage == 3:
                parameter.ds_tensor.data.reshape(-1)[: owned.length].copy_(weights[name])
            else:
                whole = parameter.detach().reshape(-1)
                owned.of(owned.flat.detach()).copy_(whole[owned.first : owned.first + owned.length])

    def gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients that this rank owns, without copying."""
        if self._offloaded and torch.cuda.is_available():
            torch.cuda.synchronize()  # DeepSpeed copies them to the host asynchronously (0.19.8)
        return {name: self._gradient(parameter, self._slices[name]) for name, parameter in self._parameters.items()}

    def _gradient(self, parameter: Any, owned: _OwnedSlice) -> Tensor:
        if self._offloaded:
            assert owned.flat.grad is not None
            return owned.of(owned.flat.grad)
        if self._stage == 3:
            part: Tensor = self._deepspeed.get_local_fp32_grad_for_param(parameter)
        elif parameter._hp_mapping is None:
            return owned.of(owned.flat.detach())
        else:
            part = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return part.reshape(-1)[: owned.length]

    def drop_gradients(self) -> None:
        """Clear the gradients in the way DeepSpeed does after a skipped step."""
        self._deepspeed.zero_grad(set_to_none=True)
        if self._stage == 3:
            self._deepspeed._partition_all_parameters()
        if self._offloaded:
            self._deepspeed.reset_cpu_buffers()
            for owned in self._slices.values():
                if owned.flat.grad is not None:
                    owned.flat.grad.zero_()
        elif self._stage == 3:
            self._deepspeed.averaged_gradients = {}
        else:
            for group in list(self._deepspeed.averaged_gradients):
                self._deepspeed.averaged_gradients[group] = None
                self._deepspeed.all_grad_tensors[group] = None
        self._deepspeed.micro_step_id = 0 if self._stage == 3 else -1

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def reset_optimizer(self) -> None:
        """Set moments and step counts to zero in place."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def moments(self) -> dict[str, Tensor]:
        """Return the live moments that this rank owns; see Engine.moments."""
        return {
            f"{name}.{kind}": owned.of(self._optimizer.state[owned.flat][kind])
            for name, owned in self._slices.items()
            for kind in MOMENTS
            if kind in self._optimizer.state.get(owned.flat, {})
        }

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Load moments and the step count `steps`. Do nothing if `moments` is empty, as before the first update."""
        if not moments:
            return
        for flat in {id(owned.flat): owned.flat for owned in self._slices.values()}.values():
            for kind in MOMENTS:
                self._optimizer.state[flat].setdefault(kind, torch.zeros_like(flat))
            self._optimizer.state[flat]["step"] = torch.tensor(float(steps))
        for name, owned in self._slices.items():
            for kind in MOMENTS:
                owned.of(self._optimizer.state[owned.flat][kind]).copy_(moments[f"{name}.{kind}"].reshape(-1))
