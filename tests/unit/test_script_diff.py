"""memfit plan --diff: a plan as an edit of the user's own script."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from child_ranks import run_script

from memfit.capture.result import ScriptAnswer
from memfit.cli.estimate_script import _edit
from memfit.cli.plan_diff import edit_of, excluded_from
from memfit.export.script_diff import ScriptDiff, inexpressible, read_script, script_diff, trains_plainly
from memfit.export.source_edits import Replacement, Source, source_of
from memfit.jobs.registry import load
from memfit.techniques.plan_file import parse_plan
from memfit.techniques.registry import TECHNIQUES
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Choice, Estimate, Interval, SearchResult

PLAIN = '''"""Trains a small network."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
blocks = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
model = nn.Sequential(nn.Linear(16, 64), blocks, nn.Linear(64, 4))
data = torch.utils.data.TensorDataset(torch.randn(60, 16), torch.randint(0, 4, (60,)))
loader = torch.utils.data.DataLoader(data, batch_size=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

for epoch in range(2):
    for index, (x, y) in enumerate(loader):
        x, y = x.to("cpu"), y.to("cpu")
        # forward
        out = model(x)
        loss = F.cross_entropy(out, y)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
print(sum(p.double().abs().sum().item() for p in model.parameters()))
'''
# As in many tutorials: the loop is in a function that is called once for each epoch.
FUNCTIONS = """import torch
from torch import nn


def train(net, batches, opt):
    net.train()
    total = 0.0
    for batch in batches:
        opt.zero_grad()
        loss = net(batch).pow(2).mean()
        loss.backward()
        opt.step()
        total += loss.item()
    return total


def main():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 2))
    opt = torch.optim.AdamW(network.parameters())
    batches = [torch.randn(8, 4) for _ in range(3)]
    print([train(network, batches, opt) for _ in range(2)])


if __name__ == "__main__":
    main()
"""
# As in references of torchvision: branches with and without a scaler, an optimizer made in branches, wrappers
# under a condition, and clipping as an option.
BRANCHES = """import sys
import torch
from torch import nn


def train(net, opt, batches, options, scaler=None):
    net.train()
    total = 0.0
    for x, y in batches:
        with torch.autocast("cpu", enabled=scaler is not None):
            out = net(x)
            loss = nn.functional.mse_loss(out, y)

        opt.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            if options["norm"] is not None:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(net.parameters(), options["norm"])
            scaler.step(opt)
            scaler.update()
        else:
            loss.backward()
            if options["norm"] is not None:
                nn.utils.clip_grad_norm_(net.parameters(), options["norm"])
            opt.step()
        total += loss.item()
    return total


def main(settings):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 2))
    if settings["name"] == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    elif settings["name"] == "adamw":
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    else:
        raise ValueError(settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    if "distributed" in sys.argv:
        network = nn.parallel.DistributedDataParallel(network)
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)]
    losses = []
    for epoch in range(2):
        losses.append(train(network, optimizer, batches, options=settings))
        scheduler.step()
    print(losses)


if __name__ == "__main__":
    main({"name": "adamw", "norm": 0.5})
"""
# As in many projects: a class of the user's own that holds model, optimizer and scheduler.
TRAINER_CLASS = """import torch
from torch import nn


class Trainer:
    def __init__(self, model, batches, norm=0.5):
        self.device, self.batches = "cpu", batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.model = model.to(self.device)
        self.norm = norm
        self.steps, self.losses = 0, []

    def compute_loss(self, x, y):
        return nn.functional.mse_loss(self.model(x), y)

    def train_epoch(self):
        self.model.train()
        for x, y in self.batches:
            loss = self.compute_loss(x.to(self.device), y)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)
            self.optimizer.step()
            self.scheduler.step()
            self.steps += 1
            self.losses.append(loss.item())

    @torch.no_grad()
    def evaluate(self):
        return sum(self.model(x).sum().item() for x, _ in self.batches)

    def fit(self):
        for epoch in range(2):
            self.train_epoch()
        print([*self.losses, self.evaluate()])


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 2))
    Trainer(network, [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)]).fit()
"""
SCALED_CLASS = (
    TRAINER_CLASS.replace("            loss.back", "            self.scaler.scale(loss).back")
    .replace("            nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)\n", "")
    .replace("self.optimizer.step()", "self.scaler.step(self.optimizer)\n            self.scaler.update()")
    .replace("    def fit(self):", "    def fit(self):\n        self.scaler = torch.amp.GradScaler('cpu')")
)
# As in PyTorch's tutorial of DDP: a method makes one step, and the optimizer is made outside the class.
STEP_METHOD = """import torch
from torch import nn


class Trainer:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str):
        self.model = model
        self.optimizer = optimizer
        self.losses = []

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(source), targets)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def train(self, batches):
        for source, targets in batches:
            self._run_batch(source, targets)


def main():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = Trainer(network, optimizer, "cpu")
    trainer.train([(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)])
    print([*trainer.losses, sum(p.sum().item() for p in network.parameters())])


if __name__ == "__main__":
    main()
"""
SCHEDULED = STEP_METHOD.replace(
    "    trainer =", "    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)\n    trainer ="
)
# As in minGPT: a method makes the optimizer and runs the loop, with a local name for the model.
ONE_METHOD = """import torch
from torch import nn


class Trainer:
    def __init__(self, model):
        self.model, self.optimizer = model, None

    def run(self):
        model = self.model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            x = torch.randn(8, 4)
            self.loss = model(x).square().mean()
            model.zero_grad(set_to_none=True)
            self.loss.backward()
            self.optimizer.step()
            losses.append(self.loss.item())
        print([*losses, sum(p.sum().item() for p in model.parameters())])


torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
Trainer(nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 2))).run()
"""
# As in nanoGPT: micro-batches of the loop's own, the next batch loaded before backward, a scaler that is off.
OWN_STEPS = """import contextlib
import torch
from torch import nn

if __name__ == "__main__":
    torch.manual_seed(0)
    steps, norm = 1, 0.5
    context = contextlib.nullcontext() if steps else torch.autocast("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 4)
    losses = []
    for epoch in range(3):
        for step in range(steps):
            with context:
                loss = model(x).square().mean()
                loss = loss / steps
            x = torch.randn(8, 4)
            scaler.scale(loss).backward()
        if norm != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    print(losses)
"""
# float16 with a scale of the loss that overflows at first and then grows.
SCALED = """import torch
from torch import nn

torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
losses, scales = [], []
for step in range(9):
    x = torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(x)
        loss = out.float().square().mean()
    opt.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(opt)
    scaler.update()
    losses.append(loss.item())
    scales.append(scaler.get_scale())
print([*losses, *scales])
"""
TRAINER = """from transformers import TrainingArguments
args = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=8,  # samples
    bf16=False,
    max_steps=2,  # few
)
"""
ACCELERATE = """from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
loader = DataLoader(data, shuffle=True, batch_size=8)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch))
"""


def diff(
    text: str, techniques: dict[str, Any], *, ranks: int = 1, batch: int = 8, **structure: Any
) -> ScriptDiff:
    plan = parse_plan({"ranks": ranks, "techniques": techniques}, what="the plan")
    return script_diff(Source("train.py", text), plan, batch_size=batch, structure=structure)


def patched(text: str, edit: ScriptDiff, folder: Path, tool: str = "patch") -> str:
    """The script after ``patch -p0`` or ``git apply -p0``."""
    assert edit.diff, edit.reason
    (folder / "train.py").write_text(text)
    command = ["patch", "-p0"] if tool == "patch" else ["git", "apply", "-p0"]
    run = subprocess.run(
        command, input=edit.diff, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return (folder / "train.py").read_text()


def output(script: str, folder: Path) -> Any:
    (folder / "run.py").write_text(script)
    run = run_script("run.py", cwd=folder)
    assert run.returncode == 0, run.stderr
    return ast.literal_eval(run.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("tool", ["patch", "git"])
def test_the_edit_of_a_plain_loop_trains_the_same(tool: str, tmp_path: Path) -> None:
    edit = diff(PLAIN, {"activation-checkpointing": {}, "adamw-single": {}}, batch=16)
    text = patched(PLAIN, edit, tmp_path, tool)
    assert "clip=1.0" in text
    assert output(text, tmp_path) == output(PLAIN, tmp_path)  # both techniques are bitwise equal


def test_the_norm_that_a_loop_logs_is_returned_by_the_step(tmp_path: Path) -> None:
    logs = (
        "total = 0.0\n"
        + PLAIN.replace("        torch.nn.utils.clip", "        norm = torch.nn.utils.clip").replace(
            "scheduler.step()\n", "scheduler.step()\n        total += float(norm)\n"
        )
        + "print(total)\n"
    )
    edit = diff(logs, {"activation-checkpointing": {}}, batch=16)
    text = patched(logs, edit, tmp_path)
    assert "norm = fit.step()" in text
    assert output(text, tmp_path) == output(logs, tmp_path) > 0


@pytest.mark.long
def test_the_edit_with_micro_batches_trains_nearly_the_same_and_warns_of_what_is_logged(
    tmp_path: Path,
) -> None:
    logging = PLAIN.replace("scheduler.step()\n", "scheduler.step()\n        last = loss.item()\n")
    edit = diff(logging, {"gradient-accumulation": {"micro_batches": 4}}, batch=16)
    assert edit.remarks[0] == "after fit.split, loss is that of the last micro-batch: check what you log"
    assert "mean over the samples" in edit.remarks[1]
    assert output(patched(logging, edit, tmp_path), tmp_path) == pytest.approx(
        output(PLAIN, tmp_path), rel=1e-6
    )


@pytest.mark.long
def test_a_count_of_steps_in_the_forward_pass_counts_steps_of_micro_batches_too(tmp_path: Path) -> None:
    counting = PLAIN.replace(
        "\n        optimizer.zero_grad()",
        "\n        done += 1\n        scheduler.step()\n        total += loss.item()\n"
        "        optimizer.zero_grad()",
    ).replace("        scheduler.step()\nprint(", "print(done, scheduler.last_epoch, ")
    counting = counting.replace("for epoch", "done, total = 0, 0.0\nfor epoch")
    edit = diff(counting, {"gradient-accumulation": {"micro_batches": 4}}, batch=16)
    assert edit.remarks[:2] == (
        "moved behind the micro-batches, to run once for each step: lines 23, 24",
        "run once for each micro-batch now, so check what they count or log: line 25",
    )
    text = patched(counting, edit, tmp_path)
    assert text.index("done += 1") > text.index("fit.backward(loss)")
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        for script in (text, counting)
    )
    assert ours[:2] == theirs[:2] == ["8", "8"]
    assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-6)


def test_a_term_of_the_loss_is_no_count_of_steps() -> None:
    text = PLAIN.replace("out, y)\n", "out, y)\n        loss += penalty\n")
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 4}}, batch=16)
    assert [line[1:].strip() for line in edit.diff.splitlines() if line.startswith("+")][-3:-1] == [
        "loss += penalty",
        "fit.backward(loss)",
    ]
    assert not any("line 21" in remark for remark in edit.remarks)


def test_a_schedule_of_the_length_of_the_loader_keeps_its_meaning_in_a_plain_loop(tmp_path: Path) -> None:
    text = PLAIN.replace("1 / (1 + step)", "1 - step / (2 * len(loader))")
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 4}}, batch=16)
    assert output(patched(text, edit, tmp_path), tmp_path) == pytest.approx(output(text, tmp_path), rel=1e-6)


def test_a_loop_in_a_function_gets_the_plan_where_the_optimizer_is_made(tmp_path: Path) -> None:
    edit = diff(FUNCTIONS, {"activation-checkpointing": {}, "optimizer-in-backward": {}})
    text = patched(FUNCTIONS, edit, tmp_path)
    assert text.index("memfit.apply(") > text.index("def main")
    assert "network, opt = fit.model, fit.optimizer" in text
    assert output(text, tmp_path) == output(FUNCTIONS, tmp_path)


def test_a_loop_with_a_scaler_in_one_branch_trains_the_same(tmp_path: Path) -> None:
    text = BRANCHES.replace('options["norm"]', "options.norm").replace(
        'main({"name": "adamw", "norm": 0.5})',
        "class Settings(dict):\n        norm = 0.5\n\n    main(Settings(name='adamw'))",
    )
    edit = diff(text, {"activation-checkpointing": {}})
    edited = patched(text, edit, tmp_path)
    assert "clip=settings.norm if settings.norm is not None else None" in edited
    assert "scaler.scale" not in edited
    assert edited.index("global fit") < edited.index("scheduler =")
    assert any("changes network after the plan is applied" in remark for remark in edit.remarks)
    assert 'with torch.autocast("cpu", enabled=scaler is not None):' in edited
    assert "scaler=" not in edited.split("memfit.apply")[1].split("\n")[0]  # main passes none
    assert output(edited, tmp_path) == output(text, tmp_path)


CLASSES = {
    "a class with its optimizer": (TRAINER_CLASS, "self.plan_fit = memfit.apply("),
    "an optimizer that the class gets": (STEP_METHOD, "        self.fit = memfit.apply("),
    "an optimizer that a scheduler outside uses": (SCHEDULED, "    global fit\n"),
    "all in one method": (ONE_METHOD, "self.fit.backward(self.loss)"),
    "a loop with other names": (
        TRAINER_CLASS.replace(
            "        for x, y", "        opt = self.optimizer\n        for x, y", 1
        ).replace("self.optimizer.step()", "opt.step()"),
        "self.plan_fit.step()",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_loop_in_a_class_of_the_users_own_trains_the_same(name: str, tmp_path: Path) -> None:
    text, line = CLASSES[name]
    edited = patched(text, diff(text, {"activation-checkpointing": {}}), tmp_path)
    assert line in edited
    assert output(edited, tmp_path) == output(text, tmp_path)
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    last = output(patched(text, edit, tmp_path), tmp_path)[-1]
    assert last == pytest.approx(output(text, tmp_path)[-1], rel=1e-4)


def test_a_teacher_before_the_model_is_run_for_each_micro_batch(tmp_path: Path) -> None:
    text = PLAIN.replace(
        "        # forward\n", "        with torch.no_grad():\n            soft = teacher(x).softmax(-1)\n"
    ).replace("F.cross_entropy(out, y)", "F.cross_entropy(out, y) + F.cross_entropy(out, soft)")
    text = text.replace("data = torch", "teacher = nn.Linear(16, 4).requires_grad_(False)\ndata = torch")
    edited = patched(text, diff(text, {"gradient-accumulation": {"micro_batches": 4}}, batch=16), tmp_path)
    assert edited.index("fit.split((x, y))") < edited.index("soft = teacher(x)")
    assert output(edited, tmp_path) == pytest.approx(output(text, tmp_path), rel=1e-6)


def test_a_scaler_that_is_made_after_a_scheduler_moves_before_it(tmp_path: Path) -> None:
    text = SCALED.replace(
        "scaler = torch", "schedule = torch.optim.lr_scheduler.StepLR(opt, 2)\nscaler = torch"
    ).replace("    scales.append", "    schedule.step()\n    scales.append")
    edited = patched(text, diff(text, {"activation-checkpointing": {}}), tmp_path)
    assert edited.index("scaler = torch") < edited.index("memfit.apply") < edited.index("schedule = torch")
    assert output(edited, tmp_path) == output(text, tmp_path)


def test_a_plan_is_not_called_as_a_function_of_the_script() -> None:
    text = FUNCTIONS.replace("def main", "def fit").replace("    main()", "    fit()")
    assert "plan_fit = memfit.apply(" in diff(text, {"activation-checkpointing": {}}).diff


def test_float16_and_the_grad_scaler_of_the_script_stay_under_a_plan_that_says_nothing_of_precision(
    tmp_path: Path,
) -> None:
    edited = patched(SCALED, diff(SCALED, {"activation-checkpointing": {}}), tmp_path)
    assert "scaler=scaler" in edited
    assert edited.index("scaler = torch.amp") < edited.index("memfit.apply") < edited.index("for step")
    values = output(SCALED, tmp_path)
    assert len(set(values[9:])) > 2, "the scale must shrink and grow"
    assert output(edited, tmp_path) == values


def test_the_autocast_of_a_plan_replaces_that_of_the_script_and_its_grad_scaler(tmp_path: Path) -> None:
    edit = diff(SCALED, {"bf16-autocast": {}})
    edited = patched(SCALED, edit, tmp_path)
    assert "with torch.autocast" not in edited
    assert "scaler=" not in edited
    assert edit.remarks == ("the plan's autocast replaces autocast and GradScaler of the script",)


def test_a_loss_scale_excludes_techniques_that_use_gradients_before_it_is_undone() -> None:
    names, reason = inexpressible(Source("train.py", SCALED))
    assert "optimizer-in-backward" in names
    assert reason == "the script clips gradients and scales its loss with a GradScaler"
    free = SCALED.replace("    nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "")
    with pytest.raises(UserError, match="scales its loss with a GradScaler"):
        diff(free, {"optimizer-in-backward": {}})
    assert diff(free.replace("growth_interval=2", "enabled=False"), {"optimizer-in-backward": {}}).diff


def test_a_loop_that_clips_under_a_condition_can_have_an_optimizer_in_backward(tmp_path: Path) -> None:
    text = BRANCHES.replace('options["norm"]', "options.norm").replace(
        'main({"name": "adamw", "norm": 0.5})',
        "class Settings(dict):\n        norm = None\n\n    main(Settings(name='adamw'))",
    )
    edited = patched(text, diff(text, {"optimizer-in-backward": {}}), tmp_path)
    assert output(edited, tmp_path) == output(text, tmp_path)
    (tmp_path / "clips.py").write_text(edited.replace("norm = None", "norm = 0.5"))
    run = run_script("clips.py", cwd=tmp_path)
    assert "clip cannot be combined with optimizer-in-backward" in run.stderr


def test_a_loop_with_micro_batches_of_its_own_trains_the_same_if_there_is_one(tmp_path: Path) -> None:
    edit = diff(OWN_STEPS, {"activation-checkpointing": {}})
    edited = patched(OWN_STEPS, edit, tmp_path)
    assert edited.index("fit.backward(loss)") < edited.index("        x = torch.randn(8, 4)\n")
    assert any("micro-batches must be one" in remark for remark in edit.remarks)
    assert not script_diff(Source("train.py", OWN_STEPS), Plan(), batch_size=8, own_micro_batches=2).diff
    assert output(edited, tmp_path) == output(OWN_STEPS, tmp_path)
    (tmp_path / "run.py").write_text(edited.replace("steps, norm = 1", "steps, norm = 2"))
    run = run_script("run.py", cwd=tmp_path)
    assert "fit.split was called before the previous step ended" in run.stderr


def test_an_edited_script_is_predicted_although_its_traced_step_cannot_be_compared_with_the_plan(
    tmp_path: Path,
) -> None:
    patched(OWN_STEPS, diff(OWN_STEPS, {"adamw-single": {}}), tmp_path)  # it clips to a norm
    command = ("-m", "memfit", "estimate", "--json", "--", sys.executable, "train.py")
    run = run_script(*command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["estimate"]["allocated_bytes"]["value"] > 0


def test_a_wrapper_under_a_condition_is_a_remark() -> None:
    text = PLAIN.replace(
        "optimizer = torch", "if len(loader) > 9:\n    model = nn.DataParallel(model)\noptimizer = torch", 1
    )
    edit = diff(text, {"adamw-single": {}})
    assert edit.diff
    assert any("uses DataParallel under a condition" in remark for remark in edit.remarks)


def test_the_name_of_the_main_module_is_no_condition() -> None:
    text = OWN_STEPS.replace("    x = torch", "    model = nn.DataParallel(model)\n    x = torch", 1)
    assert "DataParallel" in diff(text, {"adamw-single": {}}).reason


def test_a_sum_in_the_evaluation_is_no_reason_against_micro_batches() -> None:
    text = PLAIN + 'F.cross_entropy(model(x), y, reduction="sum")\n'
    assert diff(text, {"gradient-accumulation": {}}, batch=16).diff


def test_fields_of_the_job_are_arguments_of_apply() -> None:
    assert 'blocks="1"' in diff(PLAIN, {"activation-checkpointing": {}}, blocks="1").diff


def test_texts_inserted_at_one_place_keep_their_order_also_before_a_replacement() -> None:
    changes = [Replacement(start=0, end=0, text="# a\n"), Replacement(start=0, end=0, text="# b\n")]
    changes += [Replacement(start=0, end=1, text="y")]
    assert Source("train.py", "x = 1\n").replaced(changes) == "# a\n# b\ny = 1\n"


REFUSED = {
    "a loop on one line": (
        PLAIN[: PLAIN.index("        x, y = x.to")].rstrip()
        + " out = model(x); loss = F.cross_entropy(out, y); loss.backward(); optimizer.step()\n",
        "line 16 has several statements of the loop behind the head of a block: put each on a line of its",
    ),
    "accumulation of its own": (
        PLAIN.replace("        optimizer.step()\n", "        if index % 2:\n            optimizer.step()\n"),
        "line 25 makes the optimizer's step only under a condition, as a script does that accumulates",
    ),
    "a number of micro-batches of its own": (
        OWN_STEPS.replace("in range(steps)", "in range(4)"),
        "the script splits the batch of a step itself, into 4 micro-batches",
    ),
    "a scaled loss": (PLAIN.replace("loss.backward()", "(loss / 2).backward()"), "LOSS.backward()"),
    "two losses": (PLAIN.replace("loss.backward()", "out.sum().backward(); loss.backward()"), "2 times"),
    "a scaler elsewhere": (
        PLAIN.replace("loss.backward()", "loss = scaler.scale(loss)\n        loss.backward()"),
        ", as of a GradScaler, outside the statements from backward",
    ),
    "autocast elsewhere": (
        PLAIN.replace("out = model(x)", "out = cast(x)")
        .replace("F.cross_entropy(out, y)", "F.cross_entropy(model(x), y)")
        .replace("for epoch", "def cast(x):\n    with torch.autocast('cpu'):\n        return x\n\nfor epoch"),
        "uses autocast in line",
    ),
    "branches that differ": (
        PLAIN.replace(
            "        loss.backward()\n",
            "        if epoch:\n            loss.backward()\n            optimizer.step()\n"
            "        else:\n            out.backward()\n            optimizer.step()\n",
        ),
        "differ in more than a GradScaler",
    ),
    "another model later": (
        PLAIN.replace("scheduler = torch", "model = wrapped(model)\nscheduler = torch"),
        "assigns model or moves it with .to() after the script has made optimizer",
    ),
    "a model that is compiled": (
        PLAIN.replace("optimizer = torch", "model = torch.compile(model)\noptimizer = torch", 1),
        "torch.compile",
    ),
    "changed gradients": (
        PLAIN.replace(
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "model[0].weight.grad.zero_()"
        ),
        "changes gradients",
    ),
    "a plan that is applied already": (
        PLAIN.replace(
            "scheduler = torch", "fit = memfit.apply({}, model, optimizer)\nscheduler = torch"
        ).replace("loss.backward()", "fit.backward(loss)"),
        "the script applies a plan already (line 13): change the plan there",
    ),
    "a norm that is read before the step": (
        PLAIN.replace("        torch.nn.utils.clip", "        norm = torch.nn.utils.clip").replace(
            "        optimizer.step()\n", "        print(norm)\n        optimizer.step()\n"
        ),
        "line 25 reads norm, the norm of the gradients, before the optimizer's step",
    ),
    "a part of the model that is clipped": (
        PLAIN.replace("(model.parameters(), 1.0)", "(model[0].parameters(), 1.0)"),
        "changes gradients",
    ),
    "a condition that changes": (
        PLAIN.replace(
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
            "if model.count > 3:\n"
            "            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
            "        model.count += 1",
        ),
        "may change",
    ),
    "a second optimizer": (
        PLAIN.replace("# forward\n", "other.zero_grad()\n        other.step()\n"),
        "steps two optimizers",
    ),
    "a norm that is not constant": (
        PLAIN.replace("parameters(), 1.0)", "parameters(), epoch)"),
        "clips gradients depending on epoch, which changes in the loop",
    ),
    "an optimizer that is made again in the loop": (
        PLAIN.replace("scheduler.step()", "optimizer = torch.optim.SGD(model.parameters())"),
        "the loop in line 15 makes optimizer again",
    ),
    "an optimizer for each fold, of one model": (
        (
            "for fold in range(2):\n"
            "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "    for x, y in loader:\n"
            "        loss = F.cross_entropy(model(x), y)\n"
            "        optimizer.zero_grad()\n"
            "        loss.backward()\n"
            "        optimizer.step()\n"
        ),
        "makes optimizer in a loop, but model before it",
    ),
    "gradients that are freed by hand": (
        PLAIN.replace("optimizer.zero_grad()", "for p in model.parameters():\n            p.grad = None"),
        "line 22 changes gradients after the model is called",
    ),
    "a norm that is set late": (
        PLAIN.replace("parameters(), 1.0)", "parameters(), norm)").replace(
            "scheduler = torch", "used = len(optimizer.param_groups)\nnorm = 1.0 * used\nscheduler = torch"
        ),
        "line 13 uses optimizer, which the plan may replace, before line 14, after which it is applied",
    ),
    "a norm whose default is a variable": (
        (
            "def train(model, optimizer, loader, *, norm=NORM):\n"
            "    for x, y in loader:\n"
            "        loss = F.cross_entropy(model(x), y)\n"
            "        optimizer.zero_grad()\n"
            "        loss.backward()\n"
            "        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)\n"
            "        optimizer.step()\n"
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "train(model, optimizer, loader)\n"
        ),
        "depending on norm, which changes in the loop or is not known where the plan is applied",
    ),
    "a loss that begins before the model is called": (
        PLAIN.replace("# forward\n", "loss = 0.0\n").replace("loss = F", "loss += F"),
        "line 20 adds to loss, which has a value before the model is called",
    ),
    "a number of samples": (
        PLAIN.replace("# forward\n", "n = len(x)\n").replace("F.cross_entropy(out, y)", "out.sum() / n"),
        "computes n from x",
    ),
    "a sum as loss": (
        PLAIN.replace("F.cross_entropy(out, y)", 'F.cross_entropy(out, y, reduction="sum")'),
        "reduction=",
    ),
    "a sum as loss in a function": (
        PLAIN.replace("F.cross_entropy(out, y)", "loss_of(out, y)")
        + 'def loss_of(out, y):\n    return F.cross_entropy(out, y, reduction="sum")\n',
        "reduction=",
    ),
    "continue between forward and backward": (
        PLAIN.replace("        loss.b", "        if loss.isnan():\n            continue\n        loss.b"),
        "line 24 leaves a step with continue before the optimizer's step",
    ),
    "continue between backward and step": (
        PLAIN.replace(
            "backward()\n", "backward()\n        if loss > 9:\n            print(9)\n            continue\n"
        ),
        "line 26 leaves a step with continue",
    ),
    "break out of a step": (
        PLAIN.replace("backward()\n", "backward()\n        if loss > 9:\n            break\n"),
        "line 25 leaves a step with break",
    ),
    "return out of a step": (
        FUNCTIONS.replace("backward()\n", "backward()\n        if loss > 9:\n            return total\n"),
        "line 13 leaves a step with return",
    ),
    "errors that are caught": (
        FUNCTIONS.replace(
            "        loss = net(batch).pow(2).mean()\n        loss.backward()\n        opt.step()\n",
            "        try:\n            loss = net(batch).pow(2).mean()\n            loss.backward()\n"
            "            opt.step()\n        except RuntimeError:\n            print('skipped')\n",
        ),
        "line 10 catches errors of a step",
    ),
    "a scaler that another method makes": (
        SCALED_CLASS,
        "the script does not show the GradScaler self.scaler where it makes the optimizer",
    ),
    "an optimizer of a class that is made in branches": (
        TRAINER_CLASS.replace(
            "        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\n",
            "        if norm:\n            self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\n",
        ),
        "does not show where self.optimizer is made",
    ),
    "an optimizer of a scheduler for a class that moves the model": (
        SCHEDULED.replace("= model\n", "= model.to(device)\n"),
        "Trainer must get the model as it is",
    ),
    "a loss that is a sum, made elsewhere": (
        PLAIN.replace("F.cross_entropy(out, y)", "criterion(out, y)").replace(
            "optimizer =", "criterion = nn.CrossEntropyLoss(reduction='sum')\noptimizer ="
        ),
        'loss with reduction="sum"',
    ),
    "a schedule between an optimizer and what its model needs": (
        TRAINER_CLASS.replace("        self.model =", "        self.device = 'cpu'\n        self.model ="),
        "line 9 uses self.optimizer, which the plan may replace, before line 12",
    ),
    "a closure": (
        PLAIN.replace("    for index, (x, y) in enumerate(loader):\n", "    def closure(x, y):\n").replace(
            "        optimizer.step()\n        scheduler.step()\n", "    optimizer.step(closure)\n"
        ),
        "passes a closure to the optimizer's step",
    ),
    "no loop": ("import torch\n", "backward 0 times"),
    "text of several lines": (
        PLAIN.replace("out = model(x)\n", 'out = model(x)\n        print("""\n""")\n'),
        "string literal of several lines",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_script_that_cannot_be_edited_safely_gets_the_reason_and_the_lines(name: str) -> None:
    text, reason = REFUSED[name]
    precision: dict[str, Any] = {"bf16-autocast": {}} if name == "autocast elsewhere" else {}
    edit = diff(text, {"gradient-accumulation": {}} | precision, batch=16)
    assert not edit.diff
    assert reason in edit.reason
    assert "\n" not in edit.reason
    assert any("memfit.apply(" in line for line in edit.lines)
    assert any("fit.backward(loss)" in line for line in edit.lines)


def test_a_jump_that_stays_in_a_step_or_comes_before_or_after_it_is_no_reason() -> None:
    text = PLAIN.replace("# forward\n", "if len(x) < 2:\n            continue\n").replace(
        "scheduler.step()\n", "scheduler.step()\n        if index > 9:\n            break\n"
    )
    text = text.replace(
        "        loss.backward()\n", "        for i in x:\n            break\n        loss.backward()\n"
    )
    edit = diff(text, {"activation-checkpointing": {}}, batch=16)
    assert edit.diff, edit.reason


def test_the_edit_says_what_a_saved_state_holds_under_the_plan() -> None:
    saves = PLAIN + "torch.save(model.state_dict(), 'model.pt')\n"
    line = f"line {saves.count(chr(10))}"
    remarks = diff(saves, {"bf16-parameters": {}}).remarks
    assert [r for r in remarks if "state_dict() is in bf16" in r and r.endswith(line)]
    ranks = saves.replace("import torch\n", "import torch\n" + SEVERAL_RANKS, 1)
    assert any("parts of one rank only" in r for r in diff(ranks, {"fsdp2": {}}, ranks=2).remarks)
    assert not any("state_dict" in r for r in diff(PLAIN, {"bf16-parameters": {}}).remarks)


SEVERAL_RANKS = """from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler
init_process_group()
sampler = DistributedSampler([])
"""


def test_a_plan_of_several_ranks_needs_a_script_of_several_ranks_and_all_reasons_are_named() -> None:
    edit = diff(PLAIN, {"ddp": {}}, ranks=2)
    assert "both init_process_group and DistributedSampler" in edit.reason
    assert edit.reason.endswith("but it lacks init_process_group and DistributedSampler")
    wrapped = PLAIN.replace(
        "optimizer = torch", "model = nn.parallel.DistributedDataParallel(model)\noptimizer = torch", 1
    ).replace("loss.backward()", "(loss / 2).backward()")
    assert wrapped != PLAIN
    reason = diff(wrapped, {"fsdp2": {}}, ranks=2).reason
    assert "DistributedDataParallel (line 12): take its lines out of the script first" in reason
    assert "lacks init_process_group and DistributedSampler" in reason
    assert "LOSS.backward()" in reason
    assert reason.count("DistributedDataParallel") == 1


def test_a_script_without_what_averages_gradients_trains_plainly_on_one_rank_only() -> None:
    wrapped = PLAIN.replace("optimizer = torch", "model = DDP(model)\noptimizer = torch", 1)
    for text, is_plain in (
        (PLAIN, False),
        (SEVERAL_RANKS + PLAIN, False),
        (SEVERAL_RANKS + wrapped, True),
        (ACCELERATE, True),
        (TRAINER, True),
    ):
        source = Source("train.py", text)
        assert (trains_plainly(source, 1), trains_plainly(source, 2)) == (True, is_plain)


def test_an_import_that_nothing_uses_is_in_no_plans_way() -> None:
    text = PLAIN.replace("import torch\n", "import torch\n" + SEVERAL_RANKS, 1)
    assert diff(text, {"ddp": {}}, ranks=2).diff
    used = text.replace("optimizer = torch", "model = DDP(model)\noptimizer = torch", 1)
    assert "DistributedDataParallel (line 17)" in diff(used, {"ddp": {}}, ranks=2).reason


def test_a_script_that_cannot_be_edited_is_named_before_the_search(
    capsys: pytest.CaptureFixture[str],
) -> None:
    excluded_from(Source("train.py", PLAIN), 1)
    assert "cannot be edited" not in capsys.readouterr().err
    excluded_from(Source("train.py", PLAIN), 8)
    told = capsys.readouterr().err
    assert told.startswith("note: train.py cannot be edited safely: the plan has 8 ranks, ")
    assert "After the search" in told


def test_training_arguments_are_changed_and_added(tmp_path: Path) -> None:
    techniques = {
        "activation-checkpointing": {},
        "bf16-autocast": {},
        "gradient-accumulation": {"micro_batches": 2},
    }
    edit = diff(TRAINER, techniques)
    text = patched(TRAINER, edit, tmp_path)
    assert text == TRAINER.replace("=8,  #", "=4,  #").replace("bf16=False", "bf16=True").replace(
        "# few\n",
        "# few\n    gradient_accumulation_steps=2,\n    gradient_checkpointing=True,\n"
        '    gradient_checkpointing_kwargs={"use_reentrant": False},\n',
    )


def test_the_batch_of_training_arguments_is_divided_whatever_expression_it_is() -> None:
    text = "a = TrainingArguments('out', per_device_train_batch_size=options.batch)\n"
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 4}})
    assert "+a = TrainingArguments('out', per_device_train_batch_size=options.batch // 4, " in edit.diff
    accumulated = text.replace("batch)", "batch, gradient_accumulation_steps=2)")
    edit = diff(accumulated, {"gradient-accumulation": {"micro_batches": 4}})
    assert "options.batch * 2 // 4, gradient_accumulation_steps=4)" in edit.diff


def test_losses_that_the_trainer_does_not_average_are_said() -> None:
    split = {"gradient-accumulation": {"micro_batches": 2}}
    assert any("num_items_in_batch" in r for r in diff(TRAINER, split).remarks)
    accumulates = TRAINER.replace("=8,  #", "=4, gradient_accumulation_steps=2,  #")
    assert not any("num_items_in_batch" in r for r in diff(accumulates, split).remarks)
    assert not any("num_items_in_batch" in r for r in diff(TRAINER, {"bf16-autocast": {}}).remarks)


def test_a_batch_that_differs_from_the_plans_is_said() -> None:
    assert "the script trains with 8" in diff(TRAINER, {"bf16-autocast": {}}, batch=16).remarks[0]


def test_other_defaults_of_derived_classes_are_overridden() -> None:
    """SFTConfig recomputes by default."""
    edit = diff(TRAINER.replace("TrainingArguments", "SFTConfig"), {"bf16-autocast": {}})
    assert "gradient_checkpointing=False" in edit.diff


def test_a_plan_for_the_scripts_own_step_ends_nothing_that_the_script_does_itself() -> None:
    plan = parse_plan({"techniques": {"gradient-accumulation": {"micro_batches": 2}}}, what="the plan")
    for name in ("TrainingArguments", "SFTConfig"):
        text = f"a = {name}('out', per_device_train_batch_size=8, bf16=True, gradient_checkpointing=True)\n"
        own = script_diff(Source("train.py", text), plan, batch_size=8, keeps_enabled=True)
        assert "bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2)" in own.diff
    other = script_diff(Source("train.py", text), plan, batch_size=8)
    assert "bf16=False" in other.diff


def test_a_plan_that_training_arguments_cannot_express_is_refused_with_all_reasons() -> None:
    with pytest.raises(UserError, match="activation-offload is not supported; chunked-cross-entropy"):
        diff(TRAINER, {"chunked-cross-entropy": {}, "activation-offload": {}})


def test_arguments_from_a_command_line_are_printed() -> None:
    text = (
        "from transformers import HfArgumentParser, TrainingArguments\nHfArgumentParser(TrainingArguments)\n"
    )
    edit = diff(text, {"bf16-autocast": {}})
    assert not edit.diff
    assert "bf16=True" in edit.lines


def test_accelerator_gets_its_arguments_and_a_smaller_batch() -> None:
    edit = diff(
        ACCELERATE, {"bf16-autocast": {}, "gradient-accumulation": {"micro_batches": 2}, "adafactor": {}}
    )
    assert (
        '+accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)'
        in edit.diff
    )
    assert "+loader = DataLoader(data, shuffle=True, batch_size=4)" in edit.diff
    assert edit.remarks[0].startswith("Accelerate does not apply adafactor")


def test_the_loader_of_several_that_the_training_loop_runs_over_gets_the_smaller_batch() -> None:
    text = ACCELERATE.replace("shuffle=True, ", "").replace(
        "for batch", "valid = DataLoader(rest, batch_size=8)\nfor batch"
    )
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    assert "+loader = DataLoader(data, batch_size=4)" in edit.diff
    assert "+valid" not in edit.diff


@pytest.mark.parametrize(("old_steps", "batch"), [("4", "16"), ("steps", "8 * steps // 2")])
def test_the_batch_of_accelerate_stays_if_the_script_accumulates_already(old_steps: str, batch: str) -> None:
    text = ACCELERATE.replace("cpu=True", f"cpu=True, gradient_accumulation_steps={old_steps}")
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    assert "gradient_accumulation_steps=2)" in edit.diff
    assert f"+loader = DataLoader(data, shuffle=True, batch_size={batch})" in edit.diff


def test_accelerate_without_accumulate_is_not_edited() -> None:
    edit = diff(ACCELERATE.replace("accumulate", "other"), {"gradient-accumulation": {"micro_batches": 2}})
    assert not edit.diff
    assert "accumulate" in edit.reason


@pytest.mark.parametrize("rest", [", shuffle=True", ", True", ", sampler=order"])
def test_a_batch_size_by_position_is_edited_as_a_keyword_is(rest: str) -> None:
    plan = {"gradient-accumulation": {"micro_batches": 4}}
    for text in (ACCELERATE, LIGHTNING.replace("batch_size=20, shuffle=True", "shuffle=True, batch_size=8")):
        script = text.replace(", shuffle=True, batch_size=8", f", options.batch{rest}")
        assert f"+loader = DataLoader(data, options.batch // 4{rest})" in diff(script, plan).diff


def test_accumulation_of_the_scripts_own_is_undone_for_a_plan_without_it() -> None:
    text = ACCELERATE.replace("cpu=True", "cpu=True, gradient_accumulation_steps=2")
    edit = diff(text, {"bf16-autocast": {}}, batch=16)
    assert "gradient_accumulation_steps=1" in edit.diff
    assert "batch_size=16)" in edit.diff


def test_lines_to_insert_by_hand_begin_with_the_batch_of_the_loader() -> None:
    plan = {"bf16-autocast": {}, "gradient-accumulation": {"micro_batches": 4}}
    elsewhere = ACCELERATE.replace("DataLoader(", "make_loader(").replace("accumulate", "other")
    edit = diff(elsewhere, plan, batch=32)
    assert edit.lines == (
        "DataLoader(..., batch_size=8)  # one of 4 micro-batches of 32 samples",
        'Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)',
        "with accelerator.accumulate(model):  # around the step",
    )
    module = LIGHTNING.replace("loader = DataLoader(data, batch_size=20, shuffle=True)\n", "")
    assert diff(module, plan, batch=32).lines[0].startswith("DataLoader(..., batch_size=8)")
    unpacked = "a = TrainingArguments('out', **options)\n"
    assert diff(unpacked, plan, batch=32).lines[:2] == (
        "per_device_train_batch_size=8",
        "gradient_accumulation_steps=4",
    )
    assert any("all 32 samples" in line for line in diff("import torch\n", plan, batch=32).lines)
    own_steps = diff(OWN_STEPS, {"activation-checkpointing": {}}, batch=32)
    assert any("all its 32 samples" in remark for remark in own_steps.remarks)


SCHEDULED = """from accelerate import Accelerator
accelerator = Accelerator()
loader = DataLoader(data, shuffle=True, batch_size=8)
optimizer = AdamW(model.parameters())
updates = 3 * len(loader)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=updates)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for epoch in range(3):
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            print(step, len(loader))
"""


def test_the_schedule_of_accelerate_counts_updates_and_what_counts_batches_is_named() -> None:
    edit = diff(SCHEDULED, {"gradient-accumulation": {"micro_batches": 4}})
    assert "+loader = DataLoader(data, shuffle=True, batch_size=2)" in edit.diff
    assert "+updates = 3 * -(-len(loader) // 4)" in edit.diff
    assert edit.remarks == (
        "the schedule of line 5 counts updates of 4 micro-batches: check its length",
        (
            "iterations of the loop and batches of the DataLoader are now micro-batches, 4 for each update; "
            "check what counts them: lines 15, 16"
        ),
    )


def test_a_schedule_that_steps_with_each_iteration_of_accelerate_is_named_or_right() -> None:
    text = SCHEDULED.replace("loader, scheduler =", "loader =").replace("loader, scheduler)", "loader)")
    edit = diff(text.replace("step % 10", "True"), {"gradient-accumulation": {"micro_batches": 4}})
    assert "+updates" not in edit.diff  # both its length and its steps count iterations
    constant = diff(text.replace("len(loader)\n", "99\n"), {"gradient-accumulation": {"micro_batches": 4}})
    assert "lines 13, 15, 16" in constant.remarks[-1]
    synchronized = text.replace(
        "            scheduler.step()\n",
        "            if accelerator.sync_gradients:\n                scheduler.step()\n",
    )
    edit = diff(synchronized, {"gradient-accumulation": {"micro_batches": 4}})
    assert "+updates = 3 * -(-len(loader) // 4)" in edit.diff


def test_a_schedule_of_a_script_that_accumulates_already_is_adapted_or_named() -> None:
    text = SCHEDULED.replace("Accelerator()", "Accelerator(gradient_accumulation_steps=each)")
    plan = {"gradient-accumulation": {"micro_batches": 4}}
    divided = diff(text.replace("3 * len(loader)", "3 * len(loader) // each"), plan)
    assert "+updates = 3 * len(loader) // 4" in divided.diff
    assert "lines 5, 15" in diff(text, plan).remarks[-1]
    same = text.replace("steps=each", "steps=4").replace("size=8", "size=2")
    assert diff(same, plan).remarks == ()
    assert diff(same, plan).diff == ""


def test_what_else_uses_the_length_of_a_schedule_keeps_it_as_it_is() -> None:
    edit = diff(SCHEDULED + "stop_after(updates)\n", {"gradient-accumulation": {"micro_batches": 4}})
    assert "+updates" not in edit.diff
    assert "lines 5, 15, 16" in edit.remarks[-1]


def test_a_reader_of_the_trainers_batch_is_named() -> None:
    text = TRAINER + "steps = len(data) // args.per_device_train_batch_size\n"
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    assert any(r.startswith("line 8 reads per_device_train_batch_size") for r in edit.remarks)


LIGHTNING = """import lightning as L
loader = DataLoader(data, batch_size=20, shuffle=True)
trainer = L.Trainer(max_epochs=20)
trainer.fit(model, loader)
"""


def test_lightnings_trainer_gets_precision_and_accumulation_and_a_smaller_batch() -> None:
    edit = diff(LIGHTNING, {"bf16-autocast": {}, "gradient-accumulation": {"micro_batches": 2}, "sgd": {}})
    assert (
        '+trainer = L.Trainer(max_epochs=20, precision="bf16-mixed", accumulate_grad_batches=2)' in edit.diff
    )
    assert "+loader = DataLoader(data, batch_size=10, shuffle=True)" in edit.diff
    assert edit.remarks[0].startswith("Lightning does not apply sgd")


def test_lightnings_schedule_counts_updates_and_its_settings_in_batches_are_named() -> None:
    text = LIGHTNING.replace("=20)\n", "=20, limit_train_batches=50)\n").replace(
        "trainer =", "schedule = OneCycleLR(optimizer, 0.1, len(loader))\ntrainer ="
    )
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    assert "+schedule = OneCycleLR(optimizer, 0.1, -(-len(loader) // 2))" in edit.diff
    assert "line 4" in edit.remarks[-1]


def test_a_module_that_optimizes_manually_gets_no_accumulation() -> None:
    text = LIGHTNING + "module.automatic_optimization = False\n"
    assert "optimizes manually" in diff(text, {"gradient-accumulation": {"micro_batches": 2}}).reason
    assert diff(text, {"bf16-autocast": {}}).diff


def test_a_trainer_of_another_library_is_none_of_lightning() -> None:
    text = LIGHTNING.replace("import lightning as L", "import other as L")
    assert "backward 0 times" in diff(text, {"bf16-autocast": {}}).reason


def test_accelerators_in_two_branches_get_the_same_arguments() -> None:
    text = "if a:\n    x = Accelerator(cpu=True)\nelse:\n    x = Accelerator()\n"
    edit = diff(text, {"bf16-autocast": {}})
    assert '+    x = Accelerator(cpu=True, mixed_precision="bf16")' in edit.diff
    assert '+    x = Accelerator(mixed_precision="bf16")' in edit.diff


def test_a_file_that_is_not_python_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.py cannot be parsed"):
        diff("for", {})


def test_a_file_without_a_last_line_end_is_patched(tmp_path: Path) -> None:
    text = "a = Accelerator()"
    assert (
        patched(text, diff(text, {"bf16-autocast": {}}), tmp_path)
        == 'a = Accelerator(mixed_precision="bf16")'
    )


def test_a_form_feed_does_not_end_a_line(tmp_path: Path) -> None:
    text = "a = 1\n\x0c\nb = '\x1c'\nc = Accelerator(cpu=True)\n"
    edit = diff(text, {"bf16-autocast": {}})
    assert patched(text, edit, tmp_path) == text.replace("=True", '=True, mixed_precision="bf16"')


def test_columns_count_bytes(tmp_path: Path) -> None:
    text = 'a, ü = "日本", TrainingArguments("é", bf16=False)\n'
    assert patched(text, diff(text, {"bf16-autocast": {}}), tmp_path).startswith(
        'a, ü = "日本", TrainingArguments("é", bf16=True'
    )


def test_the_edit_of_a_script_is_not_that_of_a_plan_for_the_default_job(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN)
    run = run_script("-m", "memfit", "plan", "--diff", "train.py", cwd=tmp_path)
    assert run.returncode == 2
    assert "without JOB" in run.stderr
    assert "memfit estimate --plans --diff -- python train.py" in run.stderr


def test_the_command_prints_the_diff_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN)
    (tmp_path / "plan.yaml").write_text("techniques:\n  bf16-autocast: {}\n")
    command = ("-m", "memfit", "plan", "protein-ss", "--batch", "16")
    run = run_script(*command, "--diff", "train.py", "--plan", "plan.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("--- train.py\n+++ train.py\n")
    assert "bf16-autocast" in run.stderr
    assert (tmp_path / "train.py").read_text() == PLAIN


_JOBS = """import torch
from torch import nn
from torch.nn import functional
from memfit import Job

def labels(step, seed):
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(0, 4, (16, 8), generator=generator)
    y[:8, 2:] = -100
    return {"x": torch.randn(16, 8, 16, generator=generator), "y": y}

def images(step, seed):
    return {"x": labels(step, seed)["x"], "y": torch.randint(0, 4, (16,))}

padded = Job(name="padded", build_model=lambda: nn.Linear(16, 4), make_batch=labels, batch_size=16,
    loss=lambda model, batch: functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten()))
weighted = Job(name="weighted", build_model=padded.build_model, make_batch=labels, batch_size=16,
    loss=padded.loss, loss_terms=lambda batch: int((batch["y"] != -100).sum()))
normalized = Job(name="normalized", make_batch=images, batch_size=16,
    build_model=lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(128, 4)),
    loss=lambda model, batch: functional.cross_entropy(model(batch["x"]), batch["y"]))
"""


def test_a_job_whose_parts_have_unequal_terms_needs_them_in_the_edited_script(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(_JOBS)
    job = load(JobRef(spec=f"{tmp_path / 'jobs.py'}:weighted"))
    plan = parse_plan({"techniques": {"gradient-accumulation": {"micro_batches": 2}}}, what="the plan")
    edit = script_diff(Source("train.py", PLAIN), plan, batch_size=16, job=job)
    assert "loss_terms=loss_terms" in edit.diff  # which the script does not define: it ends in an error
    assert edit.remarks[0].startswith("define loss_terms(batch)")
    (remark,) = script_diff(Source("train.py", TRAINER), plan, batch_size=16, job=job).remarks[-1:]
    assert "multiply the mean loss of each micro-batch by terms / step_terms" in remark
    with pytest.raises(UserError, match="Accelerate weights all parts of a batch"):
        script_diff(Source("train.py", ACCELERATE), plan, batch_size=16, job=job)


def test_the_diff_says_what_splitting_the_batch_changes_and_is_refused_with_wrong_weights(
    tmp_path: Path,
) -> None:
    (tmp_path / "jobs.py").write_text(_JOBS)
    (tmp_path / "train.py").write_text(PLAIN)
    (tmp_path / "plan.yaml").write_text("techniques:\n  gradient-accumulation: {micro_batches: 2}\n")
    rest = ("--diff", "train.py", "--plan", "plan.yaml")
    run = run_script("-m", "memfit", "plan", "jobs.py:normalized", *rest, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "note: E3: splitting the batch changes BatchNorm's statistics" in run.stderr
    run = run_script("-m", "memfit", "plan", "jobs.py:padded", *rest, cwd=tmp_path)
    assert run.returncode == 2
    assert "weight its loss terms wrongly" in run.stderr
    assert not run.stdout


def _found(recommended: dict[str, Any], *others: dict[str, Any]) -> SearchResult:
    """Return the result of a search in which all plans fit."""
    plans = [parse_plan({"techniques": t}, what="the plan") for t in (recommended, *others)]
    estimates = [
        Estimate(
            plan=plan,
            allocated_bytes=Interval(value=1.0, low=1.0, high=1.0),
            phase_peak_bytes={},
            at_peak_bytes={},
            by_module_bytes={},
            flops_per_step=0,
            step_s=Interval(value=float(n), low=float(n), high=float(n)),
        )
        for n, plan in enumerate(plans)
    ]
    first, *rest = (Choice(estimate=e, fits=True, effect=EffectClass.E0) for e in estimates)
    return SearchResult(
        goal="fastest",
        cap_bytes=2,
        considered=2,
        baseline=first,
        frontier=(*rest, first),
        recommended=first,
        smallest=first,
    )


def test_a_script_for_which_plain_training_is_recommended_needs_no_edit(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("model(batch).sum().backward()\noptimizer.step()\n")
    answer = ScriptAnswer(program="train.py", plans=_found({}), batch_size=8)
    assert _edit(read_script(path), answer, on_host=True) == ScriptDiff(diff="")


def test_a_plan_that_the_library_cannot_express_gives_way_to_the_next(tmp_path: Path) -> None:
    source = Source("train.py", TRAINER)
    slow, every = {"gradient-accumulation": {"micro_batches": 2}}, {"activation-checkpointing": {"every": 2}}
    plan, edit = edit_of(source, _found(every, {"activation-checkpointing": {"every": 1}}, slow), 8, {})
    assert plan.get("activation-checkpointing") is not None
    assert "gradient_checkpointing=True" in edit.diff
    assert (
        "activation-checkpointing(every=2) is better, but TrainingArguments cannot express" in edit.remarks[0]
    )
    with pytest.raises(UserError, match="cannot express this plan"):
        edit_of(source, _found(every), 8, {})


UNCLIPPED = "".join(line for line in PLAIN.splitlines(keepends=True) if "clip_grad_norm_" not in line)


def test_no_edit_is_printed_that_memfit_apply_refuses() -> None:
    assert "clip_grad_norm_" in PLAIN
    assert diff(UNCLIPPED, {"optimizer-in-backward": {}}).diff
    with pytest.raises(
        UserError, match="clips gradients, which cannot be combined with optimizer-in-backward"
    ):
        diff(PLAIN, {"optimizer-in-backward": {}})
    assert diff(PLAIN, {"bf16-autocast": {}}).diff


FOLDS = """#!/usr/bin/env python
def main():
    import torch
    from torch import nn

    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in torch.randn(3, 8, 4):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums.append(sum(p.sum().item() for p in model.parameters()))


sums = []
main()
import json
"""


def test_a_model_for_each_fold_gets_the_plan_in_the_loop_and_memfit_is_imported_before(
    tmp_path: Path,
) -> None:
    edited = patched(FOLDS, diff(FOLDS, {"gradient-accumulation": {"micro_batches": 2}}), tmp_path)
    assert edited.startswith("#!/usr/bin/env python\nimport memfit\n")
    plain, with_plan = dict[str, Any](), dict[str, Any]()
    exec(FOLDS, plain)
    exec(edited, with_plan)
    assert with_plan["sums"] == pytest.approx(plain["sums"], rel=1e-4)


def test_what_is_read_after_the_step_is_said_to_be_of_the_last_micro_batch() -> None:
    text = PLAIN.replace("scheduler.step()", "print(loss.item(), out.argmax(1) == y)")
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    told = "after fit.split, loss, out, y are those of the last micro-batch: check what you log"
    assert told in edit.remarks


def test_the_plan_is_applied_where_the_clipping_norm_is_known() -> None:
    text = PLAIN.replace("parameters(), 1.0)", "parameters(), norm)")
    text = text.replace("scheduler = torch", "norm = 1.0\nscheduler = torch")
    edit = diff(text, {"gradient-accumulation": {"micro_batches": 2}})
    added = [line for line in edit.diff.splitlines() if line.startswith(("+fit", "+    clip", " norm"))]
    assert added[0] == " norm = 1.0"
    assert any("clip=norm" in line for line in added[1:])


@pytest.mark.parametrize(
    ("parameter", "argument"), [("norm", ", 0.5"), ("norm", ", norm=0.5"), ("norm=0.5", "")]
)
def test_a_clipping_norm_that_is_a_number_in_the_call_of_the_loop_is_known(
    parameter: str, argument: str, tmp_path: Path
) -> None:
    text = FUNCTIONS.replace("batches, opt):", f"batches, opt, {parameter}):")
    text = text.replace("batches, opt) for", f"batches, opt{argument}) for")
    text = text.replace(
        "        opt.step()", "        nn.utils.clip_grad_norm_(net.parameters(), norm)\n        opt.step()"
    )
    edit = diff(text, {"activation-checkpointing": {}})
    assert "clip=0.5" in edit.diff
    (tmp_path / "before.py").write_text(text)
    patched(text, edit, tmp_path)
    outputs = [run_script(name, cwd=tmp_path).stdout for name in ("before.py", "train.py")]
    assert outputs[0] == outputs[1] != ""


def test_what_is_read_after_the_loop_is_that_of_the_last_micro_batch() -> None:
    split = {"gradient-accumulation": {"micro_batches": 2}}
    mark = "loss is that of the last micro-batch"
    shown = UNCLIPPED + "\nprint(loss)\n"
    assert not any(mark in r for r in diff(UNCLIPPED, split).remarks)
    assert any(mark in r for r in diff(shown, split).remarks)
    assert not any(mark in r for r in diff(shown.replace("print", "loss = 0\nprint"), split).remarks)


def test_lines_to_insert_by_hand_name_clipping_and_scaler() -> None:
    twice = SCALED.replace("    scaler.step", "    (0 * loss).backward()\n    scaler.step")
    assert twice != SCALED
    lines = "\n".join(diff(twice, {"activation-checkpointing": {}}).lines)
    assert "clip=0.5" in lines
    assert "scaler=scaler" in lines
    lines = "\n".join(diff(twice.replace("0.5)", "max(0.5, 1))"), {"bf16-autocast": {}}).lines)
    assert "clip=..." in lines
    assert "scaler" not in lines


def test_a_search_leaves_out_what_the_script_cannot_have() -> None:
    assert inexpressible(Source("train.py", UNCLIPPED)) == ((), "")
    names, reason = inexpressible(Source("train.py", PLAIN))
    assert (names, reason) == (("optimizer-in-backward",), "the script clips gradients")
    for text, library in (
        (TRAINER, "TrainingArguments"),
        (TRAINER.replace("TrainingArguments", "Seq2SeqTrainingArguments"), "TrainingArguments"),
        (
            "from transformers import TrainingArguments as Settings\n"
            + TRAINER.replace("TrainingArguments(", "Settings("),
            "TrainingArguments",
        ),
        (ACCELERATE, "Accelerate"),
        (LIGHTNING, "Lightning"),
    ):
        names, reason = inexpressible(Source("train.py", text))
        assert library in reason
        assert {"activation-offload", "optimizer-in-backward"} <= set(names)
        assert not {"bf16-autocast", "gradient-accumulation"} & set(names)
        for name in set(TECHNIQUES) - set(names) - {"fsdp2", "ddp", "zero", "compile"}:
            edit = diff(text, {name: {}})
            assert not any("does not apply" in remark for remark in edit.remarks)


def test_a_grad_scaler_that_may_be_disabled_is_remarked_on_and_not_refused(tmp_path: Path) -> None:
    text = "import sys\n" + SCALED.replace("    nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "")
    text = text.replace("growth_interval=2", "growth_interval=2, enabled=len(sys.argv) > 9")
    assert "optimizer-in-backward" not in inexpressible(Source("train.py", text))[0]
    edit = diff(text, {"optimizer-in-backward": {}})
    assert any("cannot be combined with an enabled GradScaler" in remark for remark in edit.remarks)


def test_training_arguments_for_a_processor_allow_16_bit_precision_there() -> None:
    for techniques, is_set in (({"bf16-autocast": {}}, True), ({"adamw-fused": {}}, False)):
        plan = parse_plan({"techniques": techniques}, what="the plan")
        edit = script_diff(Source("train.py", TRAINER), plan, batch_size=8, on_host=True)
        assert ("use_cpu=True" in edit.diff) == is_set


def test_a_text_is_written_as_a_literal_of_one_line() -> None:
    text = 'a "b"\n\\c\tä'
    assert source_of({text: [1]}) == '{"a \\"b\\"\\n\\\\c\\tä": [1]}'
    assert ast.literal_eval(source_of(text)) == text


ONE_LINE = """import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
blocks = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
net = nn.Sequential(nn.Linear(16, 64), blocks, nn.Linear(64, 4))
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
scaler = torch.amp.GradScaler("cpu", enabled=False)
for step in range(3):
    x = torch.randn(16, 16); y = torch.randint(0, 4, (16,))  # Ä; as in notebooks
    loss = F.cross_entropy(net(x), y); shown = f"{step}; {loss.item()}"
    opt.zero_grad(); scaler.scale(loss).backward()
    scaler.step(opt); scaler.update(); sched.step()
print(sum(p.double().abs().sum().item() for p in net.parameters()))
"""


def test_statements_of_the_loop_that_share_a_line_are_put_on_lines_of_their_own(tmp_path: Path) -> None:
    edit = diff(ONE_LINE, {"activation-checkpointing": {}}, batch=16)
    text = patched(ONE_LINE, edit, tmp_path)
    assert "\n    fit.step()\n    sched.step()\n" in text
    assert "scaler=scaler" in text
    assert output(text, tmp_path) == output(ONE_LINE, tmp_path)


def test_messages_name_the_lines_of_the_script_although_statements_were_moved() -> None:
    text = ONE_LINE.replace("shown = f", "print(loss); shown = f")
    remarks = diff(text, {"gradient-accumulation": {"micro_batches": 2}}, batch=16).remarks
    repeated = [remark for remark in remarks if "once for each micro-batch" in remark]
    assert [remark.rpartition(": ")[2] for remark in repeated] == ["line 13"]


def test_lines_to_insert_by_hand_have_the_names_of_the_script() -> None:
    text = ONE_LINE.replace("sched.step()\n", "sched.step(); net.grad = scaler.unscale_(opt)\n")
    edit = diff(text, {"activation-checkpointing": {}}, batch=16)
    assert "line 15 calls unscale_" in edit.reason
    block = "\n".join(edit.lines)
    assert 'memfit.apply({"activation-checkpointing": {"every": 1}}, net, opt, scaler=scaler)' in block
    assert "net, opt = fit.model, fit.optimizer" in block
    assert "in place of opt.step()" in block


def test_lines_to_insert_by_hand_take_no_norm_for_an_optimizer() -> None:
    groups = PLAIN.replace(
        "optimizer = torch.optim.AdamW(model.parameters(),", "opt = torch.optim.AdamW(groups,"
    )
    text = groups.replace("optimizer.", "opt.").replace(
        "        torch.nn.utils.clip", "        n = torch.nn.utils.clip"
    )
    edit = diff(
        text.replace("        opt.step()", "        print(n)\n        opt.step()"),
        {"activation-checkpointing": {}},
    )
    assert "reads n, the norm of the gradients" in edit.reason
    block = "\n".join(edit.lines)
    assert 'every": 1}}, model, opt, clip=1.0)' in block
    assert "in place of opt.step()" in block
