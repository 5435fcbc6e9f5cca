"""`memfit.from_trainer` for several processes: in launches of one and of two, by gloo."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import hf_trainer
import pytest
from child_ranks import run_children
from hf_trainer import make_trainer

import memfit
from memfit.lint.trainer_setup import setup_of_trainer
from memfit.types.errors import UserError

pytest.importorskip("accelerate", reason="the Trainer needs Accelerate")
SCRIPT = Path(__file__).parent / "trainer_ranks.py"


def launched(folder: Path, *, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    examples = {"PYTHONPATH": str(Path(hf_trainer.__file__).parent)}
    run_children(SCRIPT, [[file, json.dumps(arguments)] for file in files], env=examples)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.long
def test_ddp_of_two_processes_is_predicted_on_each_and_training_goes_on(tmp_path: Path) -> None:
    first, second = launched(tmp_path, ranks=2, gradient_accumulation_steps=2, ddp_bucket_cap_mb=7)
    assert first == second
    assert first["plan"] == {
        "ddp": {"bucket_mib": 7, "bucket_view": False, "sync": "last"},
        "gradient-accumulation": {"micro_batches": 2},
    }
    assert (first["ranks"], first["batch"], first["sum"], first["clip"]) == (2, 16, 2.0, 1.0)


def test_fsdp_of_two_processes_is_predicted_with_its_settings(tmp_path: Path) -> None:
    config = {"reshard_after_forward": False, "activation_checkpointing": True}
    answer = launched(tmp_path, ranks=2, fsdp=True, fsdp_config=config, bf16=True)[0]
    assert answer["plan"]["fsdp2"]["reshard"] is False
    assert answer["plan"]["fsdp2"]["precision"] == "bf16"
    assert "activation-checkpointing" in answer["plan"]
    assert (answer["ranks"], answer["batch"]) == (2, 8)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_number_of_ranks_may_be_given_without_a_launch(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), gradient_accumulation_steps=2, optim="adafactor")
    one = memfit.from_trainer(trainer, probe=False)
    four = memfit.from_trainer(trainer, ranks=4, machine="4xRTX-4090", probe=False)
    assert (one.plan.ranks, one.job.batch_size) == (1, 8)
    assert (four.plan.ranks, four.job.batch_size) == (4, 32)
    assert {use.technique for use in four.plan.uses} == {"ddp", "gradient-accumulation"}
    here = memfit.from_trainer(trainer, ranks=4, machine="RTX-4090", probe=False)
    assert "each of the 4 processes has a device of its own" in str(here)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_arguments_that_act_on_the_loop_alone_are_listed_as_left_out(tmp_path: Path) -> None:
    """The loss, the optimizer and the loader are the Trainer's own, and so are their arguments."""
    trainer = make_trainer(str(tmp_path), neftune_noise_alpha=5, label_smoothing_factor=0.1, learning_rate=1)
    notes = memfit.from_trainer(trainer, probe=False).estimate.assumptions
    assert [n.split(":")[0] for n in notes if n.startswith("without")] == ["without neftune_noise_alpha"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_arguments_that_no_plan_can_express_are_assumptions_of_the_prediction(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), bf16=True)
    trainer.args.fsdp = True
    trainer.args.fsdp_config = {"version": 1, "cpu_offload": True}
    found = memfit.from_trainer(trainer, ranks=2, probe=False)
    assert found.plan.get("fsdp2") is not None
    assert any(a.startswith("without fsdp_version 1:") for a in found.estimate.assumptions)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_deepspeeds_configuration_becomes_zero_with_its_stage_and_offload(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), gradient_accumulation_steps=2, bf16=True)
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": "auto"},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    trainer.args.deepspeed_plugin = types.SimpleNamespace(deepspeed_config=config)
    found = memfit.from_trainer(trainer, ranks=2, probe=False)
    used = found.plan.get("zero")
    assert used is not None
    assert (used.settings["stage"], used.settings["offload"], used.settings["precision"]) == (
        2,
        "optimizer",
        "bf16",
    )
    assert (found.plan.ranks, found.job.batch_size, found.job.clip) == (2, 16, 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_parallelism_that_is_not_predicted_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(str(tmp_path))
    monkeypatch.setattr(trainer.args, "parallelism_config", types.SimpleNamespace(tp_size=2, cp_size=1))
    with pytest.raises(UserError, match="tp_size 2; allowed: one process, DDP, FSDP or DeepSpeed"):
        memfit.from_trainer(trainer, ranks=4)
    monkeypatch.undo()
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(UserError, match="DataParallel"):
        memfit.from_trainer(trainer)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_fsdp_that_only_the_launcher_chose_is_read_from_its_plugin(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path))
    plugin = types.SimpleNamespace(
        fsdp_version=2,
        sharding_strategy=None,
        cpu_offload=types.SimpleNamespace(offload_params=True),
        activation_checkpointing=False,
        reshard_after_forward=True,
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin), parallelism_config=None
    )
    stand_in = types.SimpleNamespace(args=trainer.args, accelerator=accelerator, model=trainer.model)
    setup = setup_of_trainer(stand_in, 2)
    assert setup.fsdp is setup.accelerate
    assert setup.accelerate is not None
    assert setup.accelerate.on("fsdp_config.offload_params")
