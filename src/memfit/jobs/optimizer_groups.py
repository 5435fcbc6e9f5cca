"""The parameter groups of a user's optimizer, kept under a plan that needs another optimizer.

Techniques may replace parameters (shards, adapters, fp32 copies) and the optimizer. `UserGroups` then gives
the new optimizer the learning rates and other settings of the user's groups.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from memfit.techniques.imported_optimizer import SeparateOptimizers
from memfit.techniques.optimizers import EagerStep, StepInBackward, innermost
from memfit.techniques.precision import MasterWeights
from memfit.techniques.zero.base import ZeroOptimizer
from memfit.techniques.zero.sharded_ddp import ShardedDdp
from memfit.techniques.zero.zero_stage12 import ZeroNone
from memfit.types.errors import UserError
from memfit.types.job import OptimizerChoice

_ADAPTER = re.compile(r"\.(base_layer|lora_[AB]\.\w+|lora_magnitude_vector\.\w+)")
# Settings that choose a kernel or belong to the loss scale; the plan decides them.
_OF_THE_PLAN = frozenset({"foreach", "fused", "capturable", "differentiable", "loss_scale", "good_steps"})
_OF_ANY_OPTIMIZER = frozenset({"betas", "eps", "weight_decay"})

Group = dict[str, Any]


class UserGroups:
    """The parameter groups of ``optimizer``, the user's, which was made for parameters of ``model``. Create
    it before a plan is applied to the model. Raises UserError if the optimizer holds no parameter of it."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        self.optimizer = optimizer
        self.settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        group_of = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        names = {id(p): name for name, p in model.named_parameters()}
        self._group_of_name = {name: group_of[key] for key, name in names.items() if key in group_of}
        self._trainable = {id(p) for p in model.parameters() if p.requires_grad}
        self._left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in group_of]
        self._foreign_count = len(group_of.keys() - names.keys())
        if not self._group_of_name:
            raise UserError(
                "the argument optimizer holds no parameter of the argument model",
                hint="give the optimizer that was made for this model, or a function that makes one from a "
                "list of parameters",
            )

    def choice(self) -> OptimizerChoice:
        """Return the optimizer of a job that trains as the user does. Its maker returns the user's own
        optimizer when it is called with the trainable parameters that the model had at first, else a new one
        of the same class; it raises UserError if that class cannot be called with them. Betas, eps and weight
        decay are those of the user's first group, where it has them; the learning rate is 1, and `adopt` sets
        the user's."""
        first = self.settings[0]
        betas, eps, decay = first.get("betas"), first.get("eps"), first.get("weight_decay")
        own: dict[str, Any] = {}
        if isinstance(betas, tuple | list) and len(betas) == 2:
            own["betas"] = (float(betas[0]), float(betas[1]))
        if isinstance(eps, float):
            own["eps"] = eps
        if isinstance(decay, int | float):
            own["weight_decay"] = float(decay)
        name = type(self.optimizer).__name__.lower()
        return OptimizerChoice(name=name, learning_rate=1.0, make=self._make, **own)

    def adopt(self, optimizer: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return a torch optimizer that has the user's groups and runs ``optimizer``, the one that the plan
        made for ``model``: the user's own optimizer if the plan keeps it; ``optimizer`` itself, with its
        groups divided like the user's, if it is a torch optimizer; else a `PlanOptimizer`.

        A new parameter (an adapter) belongs to the group of the weight that it adapts. If the plan does not
        keep the user's optimizer, that one loses its parameters, so that it holds no memory. Then raises
        UserError if it has state or a learning-rate scheduler, if it does not hold exactly the trainable
        parameters of the model, if it has no betas but the plan's optimizer has, and as `PlanOptimizer` does.
        """
        is_kept = optimizer is self.optimizer
        if is_kept:
            return self.optimizer
        self._must_be_replaceable(optimizer)
        for group in self.optimizer.param_groups:
            group["params"] = []
        groups = {
            p: self._group_of_name.get(_ADAPTER.sub("", name), 0)  # the first for one that was not trained
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        if isinstance(optimizer, torch.optim.Optimizer) and "step" not in vars(optimizer):
            divide_groups(optimizer, groups)
            kind = type(optimizer)
            for group in optimizer.param_groups:
                settings = self.settings[groups[group["params"][0]]]
                self.set(group, settings, kind, self.rate_factor(group, kind))
            self.set(optimizer.defaults, self.settings[0], kind, self.rate_factor(optimizer.defaults, kind))
            return optimizer
        return PlanOptimizer(optimizer, groups, self)

    def _make(self, params: list[torch.nn.Parameter]) -> Any:
        if {id(p) for p in params} == self._trainable:
            return self.optimizer
        kind: Any = type(self.optimizer)
        names = inspect.signature(kind).parameters
        defaults = {k: v for k, v in self.optimizer.defaults.items() if k in names}
        try:
            return kind(params, **defaults)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the plan needs a new {kind.__name__}, for parameters that it makes, but "
                f"{kind.__name__}(params, ...) raised {type(error).__name__}: {str(error)[:160]}",
                allowed="an optimizer whose class can be called with a list of parameters and its defaults",
            ) from error

    def _must_be_replaceable(self, optimizer: Any) -> None:
        kind, scheduled = type(self.optimizer).__name__, any("initial_lr" in s for s in self.settings)
        if self.optimizer.state or scheduled:
            what = "has a learning-rate scheduler" if scheduled else "has state, because it has made steps"
            raise UserError(
                f"the plan replaces the optimizer {kind}, which {what}: the new one would not have it",
                allowed="a new optimizer without scheduler",
                hint="call memfit.apply first, then create the scheduler for fit.optimizer and train",
            )
        if self._left_out or self._foreign_count:
            what = (
                f"leaves out trainable parameters of the model, such as {self._left_out[0]}"
                if self._left_out
                else f"holds {self._foreign_count} parameters that are not the model's"
            )
            raise UserError(
                f"the plan replaces the optimizer {kind}, which {what}",
                allowed="an optimizer of exactly the model's trainable parameters",
                hint="set requires_grad_(False) on parameters that are not to be trained"
                if self._left_out
                else "make the optimizer of parameters of this model alone",
            )
        needs_betas = any("betas" in g for o in innermost(optimizer) for g in o.param_groups)
        if needs_betas and "betas" not in self.settings[0]:
            raise UserError(
                f"the plan replaces {kind} by {type(innermost(optimizer)[0]).__name__}, which needs betas, "
                f"but {kind} has none",
                allowed="an optimizer with betas, such as AdamW; or a plan that does not replace it",
            )

    def rate_factor(self, group: Group, kind: type) -> float:
        """Return the factor of the user's learning rates in ``group``, a group of an optimizer of the class
        ``kind`` as the plan made it: 1 for the user's own class, else the group's learning rate, since
        `choice` makes other optimizers with a learning rate of 1."""
        return 1.0 if kind is type(self.optimizer) else float(group.get("lr", 1.0))

    def set(self, group: Group, settings: Mapping[str, Any], kind: type, rate_factor: float) -> None:
        """Give ``group``, of an optimizer of the class ``kind``, the learning rate in ``settings``, those of
        one of the user's groups, times ``rate_factor``. Of the other settings it gets those that it has with
        the same type: all but the choices of a kernel (such as fused) if ``kind`` is the user's class, else
        betas, eps and weight decay. A learning rate that was a tensor, as in torchao, becomes a new
        tensor."""
        for key, value in settings.items():
            is_same_kind = kind is type(self.optimizer) or key in _OF_ANY_OPTIMIZER
            has_same_type = key in group and type(group[key]) is type(value)
            if is_same_kind and has_same_type and key not in {"params", "lr", *_OF_THE_PLAN}:
                group[key] = value
        if "lr" in group and "lr" in settings:
            rate, is_tensor = float(settings["lr"]) * rate_factor, isinstance(group["lr"], torch.Tensor)
            group["lr"] = torch.full_like(group["lr"], rate) if is_tensor else rate


def divide_groups(optimizer: torch.optim.Optimizer, groups: Mapping[torch.nn.Parameter, int]) -> None:
    """Divide each group of ``optimizer`` so that parameters to which ``groups`` gives different indices are
    in different groups, with equal settings."""
    optimizer.param_groups[:] = [
        {**group, "params": params}
        for group in optimizer.param_groups
        for index in sorted({groups[p] for p in group["params"]})
        if (params := [p for p in group["params"] if groups[p] == index])
    ]


class PlanOptimizer(torch.optim.Optimizer):
    """Shows a plan's optimizer ``inner``, which is no torch optimizer or consists of several, as one torch
    optimizer with the groups of ``user``, so that learning-rate schedulers work. ``groups``: trained
    parameter of the model -> index of its group.

    `push` passes the learning rate, weight decay and other settings of these groups on to ``inner``. Raises
    UserError if ``inner`` updates parameters of several groups as one flat tensor, as ZeRO does.
    """

    def __init__(self, inner: Any, groups: Mapping[torch.nn.Parameter, int], user: UserGroups) -> None:
        self.inner, self.user = inner, user
        indices = sorted(set(groups.values()))
        visible: list[Group] = [
            {**user.settings[i], "params": [p for p, index in groups.items() if index == i]} for i in indices
        ]
        super().__init__(visible, {})
        for optimizer in innermost(inner):
            if all(p in groups for group in optimizer.param_groups for p in group["params"]):
                divide_groups(optimizer, groups)
        self.links: list[tuple[Group, Group, type, float]] = []
        for kind, group, params in _inner_groups(inner):
            members = {groups[p] for p in params}
            if len(members) > 1:
                raise UserError(
                    f"the optimizer has {len(members)} parameter groups, but the plan's zero updates all "
                    "parameters as one tensor, with one group's settings",
                    allowed="one parameter group under zero; or a plan with fsdp2, which keeps groups",
                )
            if members:
                shown = self.param_groups[indices.index(members.pop())]
                self.links.append((group, shown, kind, user.rate_factor(group, kind)))
        self.push()

    def push(self) -> None:
        """Copy the settings of the shown groups to those of ``inner``. `step` does so, too; it must be called
        before backward if the plan updates there."""
        for group, shown, kind, rate_factor in self.links:
            self.user.set(group, shown, kind, rate_factor)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.push()
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return {"groups": settings of the shown groups, "inner": state of the plan's innermost optimizers,
        "masters": their fp32 copies of parameters}, each a list. Raises UserError under zero and sharded-ddp,
        which divide these among ranks."""
        self._must_be_whole()
        return {
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            "inner": [optimizer.state_dict() for optimizer in innermost(self.inner)],
            "masters": [master.detach().clone() for master in self._masters()],
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what `state_dict` returned under the same plan. Raises UserError under zero and sharded-ddp,
        and ValueError if the number of groups, optimizers or copies differs."""
        self._must_be_whole()
        for group, settings in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(settings)
        for optimizer, state in zip(innermost(self.inner), state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        with torch.no_grad():
            for master, value in zip(self._masters(), state_dict["masters"], strict=True):
                master.copy_(value)
        # torch replaces an optimizer's groups when it loads state.
        groups = [group for _, group, params in _inner_groups(self.inner) if params]
        self.links = [(new, *link[1:]) for new, link in zip(groups, self.links, strict=True)]

    def _masters(self) -> list[torch.Tensor]:
        shown = {p for group in self.param_groups for p in group["params"]}
        groups = [group for optimizer in innermost(self.inner) for group in optimizer.param_groups]
        return [p for group in groups for p in group["params"] if p not in shown]

    def _must_be_whole(self) -> None:
        if isinstance(self.inner, ZeroOptimizer | ShardedDdp):
            raise UserError(
                "the optimizer's state_dict cannot be made or loaded: the plan's zero or sharded-ddp divides "
                "the state among ranks",
                allowed="a plan without zero and sharded-ddp, such as one with fsdp2",
            )


def _inner_groups(optimizer: Any) -> Iterator[tuple[type, Group, list[torch.nn.Parameter]]]:
    """Yield (class, group, the model's parameters that the group updates) for each group of each torch
    optimizer inside ``optimizer``."""
    match optimizer:
        case StepInBackward() | SeparateOptimizers():
            for single in optimizer.optimizers.values():
                yield from _inner_groups(single)
        case MasterWeights():
            for param, single in zip(optimizer.params, optimizer.inner, strict=True):
                yield from ((kind, group, [param]) for kind, group, _ in _inner_groups(single))
        case ZeroOptimizer() if not isinstance(optimizer, ZeroNone):
            params = list(optimizer.params)
            yield from ((kind, group, params) for kind, group, _ in _inner_groups(optimizer.inner))
        case EagerStep() | ZeroOptimizer() | ShardedDdp():
            yield from _inner_groups(optimizer.inner)
        case _:
            for group in optimizer.param_groups:
                yield type(optimizer), group, group["params"]
