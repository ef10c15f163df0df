"""Modules whose ops follow a plan: which backend runs each is decided when a model is built and when it
changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Spec
from ..plan import Plan, make_plan


class CallsOps:
    """A module that computes through `self.ops`. On its own it dispatches per call; `Planned.bind` gives it a
    plan's."""

    ops: Any = ops

    def own_spec(self, device: torch.device, dtype: torch.dtype, training: bool) -> Spec | None:
        """A call that it makes beyond the `specs` of its model."""
        return None


class HasBuffers:
    """A module with buffers that are computed and no part of a state dict."""

    def init_non_persistent_buffers(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Computes them, where they are unless told otherwise; timm's name. dtype: of the model."""
        raise NotImplementedError


class Planned(nn.Module):
    """Chooses a backend per op from `specs`, never inside forward.

    A subclass lists the calls of its forward, and calls `bind(plan_for(...))` once its modules exist. A new
    plan is made when the module changes device, dtype, or from forward-only to training. A refused one leaves
    the module as it was.
    """

    #: "auto" or the name of a backend, as given; and the name used in error texts.
    backend: str
    name: str
    _plan: Plan

    def specs(self, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
        """Every kind of call the forward makes."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are; inputs must be there too."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters; inputs must have it too, except under autocast."""
        return next(self.parameters()).dtype

    @property
    def plan(self) -> dict[str, str]:
        """op -> the backend that runs it."""
        return dict(self._plan)

    def explain(self) -> str:
        """A table: op, the backend that runs it, and why each better candidate was refused."""
        return self._plan.explain()

    def plan_for(self, device: torch.device, dtype: torch.dtype, training: bool) -> Plan:
        """The plan for a device, dtype and direction; BackendError when a named backend cannot run it."""
        specs = self.specs(device, dtype, training)
        for module in self.modules():
            more = module.own_spec(device, dtype, training) if isinstance(module, CallsOps) else None
            if more is not None and more not in specs:
                specs.append(more)
        return make_plan(self.backend, specs, self.name)

    def bind(self, plan: Plan) -> None:
        """Makes every module below call the ops of `plan`."""
        self._plan = plan
        for module in self.modules():
            if isinstance(module, CallsOps):
                module.ops = plan.ops

    def replan(self, training: bool | None = None) -> None:
        """Plans again for the present sizes, device and dtype."""
        training = self._planned_training if training is None else training
        self.bind(self.plan_for(self.device, self.dtype, training))

    @property
    def _planned_training(self) -> bool:
        return any(spec.training for spec in self._plan.specs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Planned:
        """What .to, .half, .cuda and the like come down to: asks for the plan before anything moves."""
        device, dtype = self.device, self.dtype
        probe = fn(torch.empty(0, device=device, dtype=dtype))
        plan = self._plan
        if (probe.device, probe.dtype) != (device, dtype):
            plan = self.plan_for(probe.device, probe.dtype, self._planned_training)
        super()._apply(fn, recurse)
        self.bind(plan)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; with assign=True the tensors may bring another device or dtype: the plan follows."""
        result = super().load_state_dict(state_dict, strict, assign)
        if assign:
            self.replan()
        return result

    def train(self, mode: bool = True) -> Planned:
        """Training or evaluation mode. A module planned for the forward only gets its backward planned
        here."""
        if mode and not self._planned_training:
            self.replan(training=True)
        return super().train(mode)
