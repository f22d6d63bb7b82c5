"""One process, or several that each hold the whole model (data parallel): fp32 masters, summed gradients, torch optimizers.

In bf16 the model computes with rounded copies; gradients are summed and applied in fp32 on the masters, so neither many
micro-batches nor small updates are lost to rounding. In fp32 the master *is* the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlit.config.schema import OptimizerConfig, TuningConfig
from vlit.kernels.cross_entropy import CrossEntropy
from vlit.models.assemble import VisionLanguageModel
from vlit.models.tuning import part_of_parameters
from vlit.train.distributed import Ranks
from vlit.train.fragments import MASTER, Fragment, FragmentReader
from vlit.train.optimizer import ADAMW_STATES, MUON_STATES, adamw, clip_factor, entries_of, groups_of, norms_by_part
from vlit.types import PackedBatch


class ReplicatedEngine:
    """All trainable parameters of a stage: accumulate, clip, step, save, restore.

    Args:
        model: with ``requires_grad`` already set by ``apply_tuning``.
        lr: peak rate of parts that have none of their own.
    """

    lockstep = False

    def __init__(
        self, model: VisionLanguageModel, *, tuning: TuningConfig, lr: float, config: OptimizerConfig, ranks: Ranks
    ) -> None:
        parts = part_of_parameters(model)
        self.model, self.ranks, self.updates = model, ranks, 0
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.part = {name: parts[name] for name in self.parameters}
        self.masters: dict[str, nn.Parameter] = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self.parameters.items()
        }
        self.peak_lr = {part: tuning.of(part).lr or lr for part in set(self.part.values())}
        groups = groups_of({n: tuple(p.shape) for n, p in self.masters.items()}, self.part, config)
        plain, muon = ([g for g in groups if g.muon is wanted] for wanted in (False, True))
        self.optimizers: list[torch.optim.Optimizer] = []
        if plain:
            self.optimizers.append(adamw(entries_of(plain, self.masters, config), config))
        if muon:
            entries = entries_of(muon, self.masters, config)
            self.optimizers.append(torch.optim.Muon(entries, lr=lr, adjust_lr_fn="match_rms_adamw"))
        self._muon_names = {name for group in muon for name in group.names}

    def loss(self, row: PackedBatch) -> CrossEntropy:
        return self.model(row)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward, then move the gradients of this row onto the masters."""
        loss.backward()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """fp32 gradient of every trainable parameter; zeros where a rank's rows did not reach it."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def norms(self) -> dict[str, Tensor]:
        grads = self.gradients()
        self.ranks.sum_all(list(grads.values()))
        return norms_by_part(
            [
                (self.part[name], norm * norm)
                for name, norm in zip(grads, torch._foreach_norm(list(grads.values())), strict=True)
            ]
        )

    def step(self, lr_factor: float, clip: float | None, norm: Tensor) -> None:
        scale = clip_factor(norm, clip)
        if scale is not None:
            torch._foreach_mul_(list(self.gradients().values()), scale)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak_lr[group["part"]] * lr_factor
            optimizer.step()
        self.updates += 1
        self._copy_to_model()
        self.discard()

    def discard(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        """Round the masters into the model."""
        rounded = [(p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p]
        if rounded:
            torch._foreach_copy_([p for p, _ in rounded], [master for _, master in rounded])

    def _states_of(self, name: str) -> tuple[str, ...]:
        return MUON_STATES if name in self._muon_names else ADAMW_STATES

    def fragments(self) -> Iterator[Fragment]:
        """Whole tensors; each belongs to the rank that has the fewest bytes so far."""
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        written = [0] * self.ranks.world_size
        for name, master in sorted(self.masters.items(), key=lambda item: (-item[1].numel(), item[0])):
            owner = min(range(len(written)), key=lambda rank: (written[rank], rank))
            written[owner] += master.numel()
            if owner != self.ranks.rank:
                continue
            shape = tuple(master.shape)
            yield Fragment(name, MASTER, shape, 0, master.detach().reshape(-1))
            for kind in self._states_of(name) if states.get(master) else ():
                yield Fragment(name, kind, shape, 0, states[master][kind].reshape(-1))

    @torch.no_grad()
    def restore(self, reader: FragmentReader, updates: int) -> None:
        self.updates = updates
        owner = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, master in self.masters.items():
            master.copy_(reader.whole(name))
            if updates == 0:
                continue
            state = {kind: reader.whole(name, kind).to(master.device) for kind in self._states_of(name)}
            if name not in self._muon_names:
                state["step"] = torch.full((), float(updates), dtype=torch.float32, device=master.device)
            owner[master].state[master] = state
        self._copy_to_model()

    def whole_weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict()) if self.ranks.is_main else {}

    def close(self) -> None:
        self.discard()
