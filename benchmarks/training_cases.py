"""Trainings that do not train, and honest ones that look unusual, for benchmarks/broken_trainings.py.

Each case makes a small transformer on the CPU, its optimizer and one training step, as a user's script would.
A broken case leaves weights untrained that its script means to train: all, or those of some blocks. The list
was committed before it was first held against memfit's checks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, LENGTH, SAMPLES, BLOCKS = 48, 32, 12, 4, 4
Step = Callable[[], object]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A prepared training: what memfit.conform is called with. ``plan``: as its argument."""

    model: nn.Module
    optimizer: Any
    step: Step
    plan: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``make`` builds the training; on ``ranks`` ranks it is called on each, in a process group."""

    name: str
    make: Callable[[], Training]
    ranks: int = 1


BROKEN: list[Case] = []
HONEST: list[Case] = []


def _case(table: list[Case], name: str, ranks: int = 1) -> Callable[[Callable[[], Training]], Any]:
    def add(make: Callable[[], Training]) -> Callable[[], Training]:
        table.append(Case(name=name, make=make, ranks=ranks))
        return make

    return add


def broken(name: str, ranks: int = 1) -> Callable[[Callable[[], Training]], Any]:
    """Enter a training that does not train."""
    return _case(BROKEN, name, ranks)


def honest(name: str, ranks: int = 1) -> Callable[[Callable[[], Training]], Any]:
    """Enter a training that trains."""
    return _case(HONEST, name, ranks)


# -- the model --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward part, each with a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        return self.mix(functional.scaled_dot_product_attention(query, key, value, is_causal=True))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(functional.gelu(self.widen(self.norm_feed(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(x)
        return x + self.feed(x)


class Net(nn.Module):
    """Embedding, blocks and head. ``between(index, block, x)``: how a block is called."""

    def __init__(self, make_block: Callable[[], nn.Module] = Block, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH, sparse=sparse)
        self.blocks = nn.ModuleList([make_block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.between: Callable[[int, nn.Module, torch.Tensor], torch.Tensor] = lambda i, block, x: block(x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = self.between(index, block, x)
        return self.head(x)


def batch(samples: int = SAMPLES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input and target tokens, other ones on each rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * seed + rank)
    tokens = torch.randint(0, VOCABULARY, (samples, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Return the model's mean loss on a batch."""
    tokens, targets = batch(seed=seed)
    return functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def adamw(params: Iterable[Any], **settings: Any) -> torch.optim.AdamW:
    """Return AdamW with the learning rate 1e-3."""
    return torch.optim.AdamW(params, **{"lr": 1e-3, **settings})


def plain_step(model: nn.Module, optimizer: Any, loss: Callable[[], torch.Tensor] | None = None) -> Step:
    """Return the usual step: forward, backward, update, gradients freed."""

    def step() -> None:
        (loss() if loss is not None else loss_of(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trained_as_usual(
    model: nn.Module, optimizer: Any = None, loss: Callable[[], torch.Tensor] | None = None, plan: Any = None
) -> Training:
    """Return a training with the usual step, by default under AdamW."""
    optimizer = optimizer or adamw(p for p in model.parameters() if p.requires_grad)
    return Training(
        model=model, optimizer=optimizer, step=plain_step(model, optimizer, loss), plan=plan or {}
    )


def _without(model: nn.Module, *parts: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if not any(part in n for part in parts)]


# -- broken: the optimizer has other parameters -----------------------------------------------------------


@broken("optimizer of a deep copy of the model")
def _copy() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(copy.deepcopy(model).parameters()))


@broken("optimizer without the blocks")
def _no_blocks() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(_without(model, "blocks")))


@broken("optimizer without the second half of the blocks")
def _half_of_blocks() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(_without(model, "blocks.2", "blocks.3")))


@broken("optimizer with biases and norms only")
def _only_vectors() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(p for p in model.parameters() if p.dim() == 1))


@broken("optimizer without the attention of each block")
def _no_attention() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(_without(model, "query_key_value", "mix")))


@broken("optimizer of a dummy parameter")
def _dummy() -> Training:
    return trained_as_usual(Net(), adamw([nn.Parameter(torch.zeros(1))]))


@broken("head replaced after the optimizer was made")
def _new_head() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    model.head = nn.Linear(WIDTH, VOCABULARY)
    return trained_as_usual(model, optimizer)


@broken("blocks replaced after the optimizer was made")
def _new_blocks() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    model.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
    return trained_as_usual(model, optimizer)


@broken("weights loaded with assign=True after the optimizer was made")
def _assigned() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return trained_as_usual(model, optimizer)


@broken("parameter groups emptied")
def _emptied() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    optimizer.param_groups[0]["params"] = []
    return trained_as_usual(model, optimizer)


@broken("optimizer of the first block only")
def _first_block() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(model.blocks[0].parameters()))


@broken("optimizer without the embedding")
def _no_embedding() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(_without(model, "embed")))


# -- broken: no update, or one without effect -------------------------------------------------------------


def _stepping(step: Callable[[nn.Module, torch.optim.Optimizer], object], **settings: Any) -> Training:
    model = Net()
    optimizer = adamw(model.parameters(), **settings)
    return Training(model=model, optimizer=optimizer, step=lambda: step(model, optimizer))


@broken("the optimizer's step is never called")
def _never() -> Training:
    return _stepping(lambda model, optimizer: (loss_of(model).backward(), optimizer.zero_grad()))


@broken("the scheduler steps in place of the optimizer")
def _scheduler_only() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def step() -> None:
        loss_of(model).backward()
        scheduler.step()
        optimizer.zero_grad()

    return Training(model=model, optimizer=optimizer, step=step)


@broken("the gradient scaler scales and never steps")
def _scaler_only() -> Training:
    scaler = torch.amp.GradScaler("cpu")

    def step(model: nn.Module, optimizer: Any) -> None:
        scaler.scale(loss_of(model)).backward()
        optimizer.zero_grad()

    return _stepping(step)


@broken("gradients freed between backward and step")
def _freed() -> Training:
    return _stepping(lambda m, o: (loss_of(m).backward(), o.zero_grad(), o.step()))


@broken("gradients set to zero between backward and step, with weight decay")
def _zeroed() -> Training:
    return _stepping(lambda m, o: (loss_of(m).backward(), o.zero_grad(set_to_none=False), o.step()))


@broken("step before backward, gradients freed before both")
def _reordered() -> Training:
    return _stepping(lambda m, o: (o.zero_grad(), o.step(), loss_of(m).backward()))


@broken("accumulation that never completes")
def _never_complete() -> Training:
    count = [0]

    def step(model: nn.Module, optimizer: Any) -> None:
        (loss_of(model) / 4).backward()
        if (count[0] + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    return _stepping(step)


@broken("the optimizer's step replaced by a function that does nothing")
def _patched() -> Training:
    training = trained_as_usual(Net())
    training.optimizer.step = lambda: None
    return training


@broken("initial weights loaded again after each step")
def _reloaded() -> Training:
    model = Net()
    initial = copy.deepcopy(model.state_dict())
    training = trained_as_usual(model)
    return dataclasses.replace(training, step=lambda: (training.step(), model.load_state_dict(initial)))


@broken("weights overwritten by an average with decay 1")
def _average() -> Training:
    model = Net()
    average = [p.detach().clone() for p in model.parameters()]
    training = trained_as_usual(model)

    def step() -> None:
        training.step()
        with torch.no_grad():
            for mean, param in zip(average, model.parameters(), strict=True):
                mean.lerp_(param, 0.0)
                param.copy_(mean)

    return dataclasses.replace(training, step=step)


@broken("learning rate 0, no scheduler")
def _no_rate() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(model.parameters(), lr=0.0))


@broken("learning rate 0 for the blocks, no scheduler")
def _no_rate_for_blocks() -> Training:
    model = Net()
    groups = [{"params": _without(model, "blocks")}, {"params": model.blocks.parameters(), "lr": 0.0}]
    return trained_as_usual(model, adamw(groups))


@broken("a scheduler whose factor is always 0")
def _zero_schedule() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    return trained_as_usual(model, optimizer)


@broken("a hook of the step that zeroes the gradients")
def _zeroing_hook() -> Training:
    training = trained_as_usual(Net())

    def zero(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.zero_()

    training.optimizer.register_step_pre_hook(zero)
    return training


@broken("eps of 1e30")
def _huge_eps() -> Training:
    model = Net()
    return trained_as_usual(model, adamw(model.parameters(), eps=1e30, weight_decay=0.0))


@broken("learning rate of 1e-40")
def _tiny_rate() -> Training:
    model = Net()
    return trained_as_usual(model, torch.optim.SGD(model.parameters(), lr=1e-40))


@broken("bfloat16 weights whose updates all round away")
def _rounded_away() -> Training:
    model = Net().bfloat16()
    return trained_as_usual(model, torch.optim.SGD(model.parameters(), lr=1e-7), plan={"bf16-parameters": {}})


@broken("gradients clipped to norm 0")
def _clipped() -> Training:
    def step(model: nn.Module, optimizer: Any) -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.0)
        optimizer.step()
        optimizer.zero_grad()

    return _stepping(step, weight_decay=0.0)


@broken("a wrapper of the optimizer that forgets it")
def _wrapper() -> Training:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            """Forget the optimizer."""

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

    model = Net()
    return trained_as_usual(model, Wrapper(adamw(model.parameters())))


@broken("a guard that skips each step")
def _guard() -> Training:
    def step(model: nn.Module, optimizer: Any) -> None:
        loss_of(model).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0) < 0:
            optimizer.step()
        optimizer.zero_grad()

    return _stepping(step)


@broken("updates in backward for half of the parameters")
def _half_in_backward() -> Training:
    model = Net()
    params = list(model.parameters())
    optimizers = {p: adamw([p]) for p in params}

    def update(param: torch.Tensor) -> None:
        optimizers[param].step()  # type: ignore[index]
        param.grad = None

    for param in params[: len(params) // 2]:
        param.register_post_accumulate_grad_hook(update)

    class InBackward:
        def __init__(self) -> None:
            self.optimizers = optimizers

        def step(self) -> None:
            """Nothing is left to do after backward."""

        def zero_grad(self) -> None:
            for param in params:
                param.grad = None

    return trained_as_usual(model, InBackward())


# -- broken: no gradients ---------------------------------------------------------------------------------


def _between(call: Callable[[int, nn.Module, torch.Tensor], torch.Tensor]) -> Training:
    model = Net()
    model.between = call
    return trained_as_usual(model)


@broken("the output of the first half of the blocks detached")
def _detached_half() -> Training:
    return _between(lambda i, block, x: block(x.detach() if i == BLOCKS // 2 else x))


@broken("the blocks' contribution to the residual stream detached, in half of the blocks")
def _passed_through() -> Training:
    return _between(lambda i, block, x: x + (block(x) - x).detach() if i >= BLOCKS // 2 else block(x))


class _FrozenFeed(Block):
    def feed(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().feed(x)


@broken("the feed-forward part of each block under no_grad")
def _feed_without_gradients() -> Training:
    return trained_as_usual(Net(_FrozenFeed))


class _FrozenAttention(Block):
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return super().attend(x).detach()


@broken("the attention of each block detached")
def _attention_detached() -> Training:
    return trained_as_usual(Net(_FrozenAttention))


@broken("reentrant checkpointing whose inputs require no gradients")
def _reentrant() -> Training:
    model = Net()
    model.embed.requires_grad_(False)

    def call(index: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=True)  # type: ignore[no-any-return]

    model.between = call
    return trained_as_usual(model, plan={"activation-checkpointing": {}})


@broken("the loss of detached logits, made to require gradients")
def _detached_loss() -> Training:
    model = Net()
    return trained_as_usual(model, loss=lambda: loss_of(model).detach().requires_grad_())


@broken("the loss multiplied by 0")
def _zero_loss() -> Training:
    model = Net()
    return trained_as_usual(model, loss=lambda: 0.0 * loss_of(model))


def _ignored(model: nn.Module, reduction: str) -> torch.Tensor:
    tokens, targets = batch()
    logits = model(tokens).flatten(0, 1)
    return functional.cross_entropy(
        logits, torch.full_like(targets, -100).flatten(), ignore_index=-100, reduction=reduction
    )


@broken("all labels ignored, mean of none")
def _no_labels() -> Training:
    model = Net()
    return trained_as_usual(model, loss=lambda: _ignored(model, "mean"))


@broken("all labels ignored, sum of none")
def _sum_of_none() -> Training:
    model = Net()
    return trained_as_usual(model, loss=lambda: _ignored(model, "sum"))


@broken("gradient hooks that return zeros, on half of the blocks")
def _zero_hooks() -> Training:
    model = Net()
    for block in model.blocks[: BLOCKS // 2]:
        for param in block.parameters():
            param.register_hook(lambda gradient: gradient * 0)
    return trained_as_usual(model)


@broken("blocks called with detached parameters")
def _functional() -> Training:
    def call(index: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        detached = {name: param.detach() for name, param in block.named_parameters()}
        return torch.func.functional_call(block, detached, (x,))  # type: ignore[no-any-return]

    return _between(call)


class _Data(Block):
    def feed(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(self.norm_feed(x), self.widen.weight.data, self.widen.bias.data)
        return functional.linear(functional.gelu(hidden), self.narrow.weight.data, self.narrow.bias.data)


@broken("weights of the feed-forward part read through .data")
def _through_data() -> Training:
    return trained_as_usual(Net(_Data))


@broken("the loss of a copy of the model")
def _other_model() -> Training:
    model = Net()
    other = copy.deepcopy(model)
    return trained_as_usual(model, loss=lambda: loss_of(other))


@broken("hidden states rounded before the head")
def _hidden_rounded() -> Training:
    return _between(lambda i, block, x: block(x).round() if i == BLOCKS - 1 else block(x))


@broken("each block's input detached, so that only the last one trains")
def _inputs_detached() -> Training:
    return _between(lambda i, block, x: block(x.detach()))


class _Gated(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * (super().forward(x) - x)


@broken("blocks behind a gate that is 0 and not trained")
def _gate_shut() -> Training:
    return trained_as_usual(Net(_Gated))


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear, scale: float = 1.0, *, enabled: bool = True) -> None:
        super().__init__()
        self.base, self.scale, self.enabled = base.requires_grad_(False), scale, enabled
        self.down = nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.up = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return out + self.scale * (x @ self.down.T @ self.up.T) if self.enabled else out


def adapted_net(scale: float = 1.0, *, enabled: bool = True) -> Net:
    """Return the model with adapters on all linear layers of the blocks, and only adapters and head
    trained."""
    model = Net()
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("query_key_value", "mix", "widen", "narrow"):
            setattr(block, name, Adapted(getattr(block, name), scale, enabled=enabled))
    model.head.requires_grad_(True)
    return model


@broken("adapters switched off")
def _adapters_off() -> Training:
    return trained_as_usual(adapted_net(enabled=False), plan={"lora": {"rank": 4}})


@broken("adapters with a scale of 0")
def _adapters_of_scale_0() -> Training:
    return trained_as_usual(adapted_net(0.0), plan={"lora": {"rank": 4}})


@broken("optimizer without the adapters")
def _adapters_left_out() -> Training:
    model = adapted_net()
    return trained_as_usual(model, adamw(_without(model, ".up", ".down")), plan={"lora": {"rank": 4}})


# -- broken: copies of higher precision, values that are not finite ---------------------------------------


def _with_masters(written: Callable[[int], bool]) -> Training:
    model = Net().bfloat16()
    params = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = adamw(masters)

    def step() -> None:
        loss_of(model).backward()
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
            param.grad = None
        optimizer.step()
        with torch.no_grad():
            for index, (param, master) in enumerate(zip(params, masters, strict=True)):
                if written(index):
                    param.copy_(master)

    return Training(model=model, optimizer=optimizer, step=step, plan={"bf16-parameters": {}})


@broken("master weights updated and not written back")
def _masters_kept() -> Training:
    return _with_masters(lambda index: False)


@broken("every second master weight written back")
def _every_second_master() -> Training:
    return _with_masters(lambda index: index % 2 == 0)


@broken("gradients of one block that are not a number")
def _not_a_number() -> Training:
    return _between(lambda i, block, x: block(x) + (0 * x).abs().sqrt() if i == 1 else block(x))


# -- broken: two ranks ------------------------------------------------------------------------------------


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


@broken("FSDP2: optimizer made before fully_shard", ranks=2)
def _before_sharding() -> Training:
    model = Net()
    optimizer = adamw(model.parameters(), foreach=False)
    return trained_as_usual(_sharded(model), optimizer, plan={"fsdp2": {}})


@broken("FSDP2: the optimizer's step is never called", ranks=2)
def _sharded_never() -> Training:
    model = _sharded(Net())
    optimizer = adamw(model.parameters(), foreach=False)
    return Training(
        model=model,
        optimizer=optimizer,
        step=lambda: (loss_of(model).backward(), optimizer.zero_grad()),
        plan={"fsdp2": {}},
    )


@broken("FSDP2: optimizer without the second half of the blocks", ranks=2)
def _sharded_half() -> Training:
    model = _sharded(Net())
    params = _without(model, "blocks.2", "blocks.3")
    return trained_as_usual(model, adamw(params, foreach=False), plan={"fsdp2": {}})


@broken("DDP: only rank 0 steps", ranks=2)
def _first_rank_only() -> Training:
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = adamw(model.parameters())

    def step() -> None:
        loss_of(model).backward()
        if dist.get_rank() == 0:
            optimizer.step()
        optimizer.zero_grad()

    return Training(model=model, optimizer=optimizer, step=step, plan={"ddp": {}})


@broken("DDP: optimizer of another copy of the model", ranks=2)
def _ddp_copy() -> Training:
    model = Net()
    optimizer = adamw(copy.deepcopy(model).parameters())
    return trained_as_usual(nn.parallel.DistributedDataParallel(model), optimizer, plan={"ddp": {}})


# -- honest -----------------------------------------------------------------------------------------------


@honest("groups with and without weight decay, gradients clipped")
def _two_groups() -> Training:
    model = Net()
    params = list(model.parameters())
    optimizer = adamw(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
    )

    def step() -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Training(model=model, optimizer=optimizer, step=step)


@honest("accumulation over four micro-batches")
def _accumulating() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())

    def step() -> None:
        for index in range(4):
            (loss_of(model, index) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(
        model=model,
        optimizer=optimizer,
        step=step,
        plan={"gradient-accumulation": {"micro_batches": 4}},
    )


@honest("half of the blocks frozen")
def _half_frozen() -> Training:
    model = Net()
    model.embed.requires_grad_(False)
    for block in model.blocks[: BLOCKS // 2]:
        block.requires_grad_(False)
    return trained_as_usual(model)


@honest("all frozen but the head")
def _probe() -> Training:
    model = Net()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return trained_as_usual(model)


@honest("adapters whose second matrix begins at 0")
def _adapters() -> Training:
    return trained_as_usual(adapted_net(), plan={"lora": {"rank": 4}})


@honest("a moving average of the weights beside the model")
def _average_beside() -> Training:
    training = trained_as_usual(Net())
    average = torch.optim.swa_utils.AveragedModel(training.model)
    return dataclasses.replace(
        training, step=lambda: (training.step(), average.update_parameters(training.model))
    )


@honest("a warm-up by a scheduler, learning rate 0 in the first step")
def _warm_up() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    training = trained_as_usual(model, optimizer)
    return dataclasses.replace(training, step=lambda: (training.step(), scheduler.step()))


@honest("a warm-up by hand, learning rate 0 in the first step")
def _warm_up_by_hand() -> Training:
    training = trained_as_usual(Net())
    count = [0]

    def step() -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, count[0] / 100)
        training.step()
        count[0] += 1

    return dataclasses.replace(training, step=step)


@honest("a gradient scaler that skips the first step")
def _skipped() -> Training:
    model = Net()
    optimizer = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step() -> None:
        scaler.scale(1e3 * loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Training(model=model, optimizer=optimizer, step=step)


@honest("an embedding with sparse gradients")
def _sparse() -> Training:
    model = Net(sparse=True)
    return trained_as_usual(model, torch.optim.SGD(model.parameters(), lr=0.1))


class _Mixture(nn.Module):
    """Sixteen experts, of which each token takes one: some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(self.norm(x)).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number in chosen[chosen < 8].unique().tolist():
            here = (chosen == number).unsqueeze(-1)
            out = out + torch.where(here, self.experts[number](x), 0.0) * weights.unsqueeze(-1)
        return x + out


@honest("experts that no token chooses")
def _experts() -> Training:
    return trained_as_usual(Net(_Mixture))


@honest("the head tied to the embedding")
def _tied() -> Training:
    model = Net()
    model.head.weight = model.embed.weight
    return trained_as_usual(model)


@honest("bfloat16 weights with master weights written back")
def _masters() -> Training:
    return _with_masters(lambda index: True)


@honest("bfloat16 weights without master weights, whose norms do not move")
def _bf16_alone() -> Training:
    model = Net().bfloat16()
    return trained_as_usual(model, adamw(model.parameters(), lr=1e-4), plan={"bf16-parameters": {}})


@honest("a block that this step leaves out")
def _layer_drop() -> Training:
    return _between(lambda i, block, x: x if i == 1 else block(x))


class _ZeroStart(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * (super().forward(x) - x)


@honest("blocks that begin as the identity, by a trained scale of 0")
def _identity() -> Training:
    return trained_as_usual(Net(_ZeroStart))


class _TwoStreams(nn.Module):
    """A block of nodes and edges, as in graph networks: nothing reads the last one's edges."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        nodes, edges = pair.chunk(2, dim=-1)
        return torch.cat([nodes + self.nodes(pair).tanh(), edges + self.edges(pair).tanh()], dim=-1)


class _Graph(Net):
    def __init__(self) -> None:
        super().__init__(_TwoStreams)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = torch.cat([x, x], dim=-1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.chunk(2, dim=-1)[0])


@honest("a last block half of which nothing reads")
def _last_block() -> Training:
    return trained_as_usual(_Graph())


class _Pooled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(WIDTH, WIDTH)


@honest("a pooler that the loss does not use")
def _pooler() -> Training:
    return trained_as_usual(_Pooled())


@honest("DDP", ranks=2)
def _ddp() -> Training:
    return trained_as_usual(nn.parallel.DistributedDataParallel(Net()), plan={"ddp": {}})


@honest("FSDP2, optimizer made after fully_shard", ranks=2)
def _fsdp2() -> Training:
    model = _sharded(Net())
    return trained_as_usual(model, adamw(model.parameters(), foreach=False), plan={"fsdp2": {}})
