"""hf:NAME for well-known models: the table of published configurations, and jobs made from it."""

from __future__ import annotations

import json
import re
import sys
import types
import urllib.parse
from pathlib import Path

import pytest
import torch

from memfit.catalog.published_models import PublishedModel, find_published, published_models
from memfit.cli import app
from memfit.jobs.huggingface import read_config
from memfit.jobs.huggingface_tasks import auto_model, task_of
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.lint import models as described_models
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan

MODELS = published_models()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_has_its_published_number_of_parameters(model: PublishedModel) -> None:
    config = read_config(model.name)
    with torch.device("meta"):
        network = auto_model(task_of(config, model.name)).from_config(config)
    count = sum(parameter.numel() for parameter in network.parameters())
    output = network.get_output_embeddings()
    # a repository may store, and count, an output embedding that is tied to the input's
    is_tied = output is not None and output.weight is network.get_input_embeddings().weight
    counts = [count, count + output.weight.numel()] if is_tied else [count]
    published = model.parameters.value
    assert min(abs(n - published) for n in counts) <= model.tolerance * published, counts


def test_the_table_has_the_models_of_the_families_that_people_ask_about() -> None:
    assert len(MODELS) >= 60
    types_of_models = {model.model_type for model in MODELS}
    assert types_of_models >= {
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2"),
        *("gemma3_text", "phi", "phi3", "deepseek_v2", "deepseek_v3", "gpt2", "gpt_neo", "gpt_neox", "opt"),
        *("bloom", "falcon", "starcoder2", "olmo", "olmo2", "smollm3", "gpt_oss", "t5", "bart", "bert"),
        *("roberta", "deberta-v2", "modernbert", "esm", "vit", "dinov2", "whisper"),
    }


def test_every_name_of_the_table_means_one_model() -> None:
    names = [name.lower() for model in MODELS for name in (model.name, *model.same)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Qwen/qwen2.5-coder-7b-instruct", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-it (without the vision encoder)"),
    ],
)
def test_case_and_owner_of_a_name_do_not_matter(name: str, repository: str) -> None:
    assert load(JobRef(spec=f"hf:{name}")).name == f"hf:{repository}"


def test_a_name_of_several_models_needs_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = {f"{owner}/mini": (f"{owner}/mini", model) for owner, model in zip("ab", MODELS[:2], strict=True)}
    monkeypatch.setattr("memfit.catalog.published_models._by_name", lambda: twins)
    assert find_published("mini") is None
    assert find_published("b/Mini") == ("b/mini", MODELS[1])


def test_settings_of_a_model_of_the_table_can_be_changed() -> None:
    job = load(JobRef(spec="hf:meta-llama/Llama-3.1-8B?num_hidden_layers=2&hidden_size=64", length=32))
    assert job.name == "hf:meta-llama/Llama-3.1-8B (2 layers of width 64)"
    config = read_config("meta-llama/Llama-3.1-8B?num_hidden_layers=2")
    assert (config.num_hidden_layers, config.hidden_size, config.use_cache) == (2, 4096, False)
    with pytest.raises(UserError, match=r"the setting 'hiden_size', which .*; did you mean 'hidden_size'\?"):
        read_config("llama-3.1-8b?hiden_size=64")


@pytest.mark.parametrize("layers", [3, 40])
def test_lists_of_layers_follow_the_number_of_layers(layers: int) -> None:
    config = read_config(f"google/gemma-3-1b-pt?num_hidden_layers={layers}")
    period = ["sliding_attention"] * 5 + ["full_attention"]
    assert config.layer_types == (period * 7)[:layers]
    job = load(JobRef(spec="hf:Qwen/Qwen3-0.6B", dimensions={"layers": layers}))
    with torch.device("meta"):
        assert len(job.build_model().get_submodule("model.layers")) == layers


def test_a_setting_that_config_json_gives_as_null_is_none() -> None:
    assert read_config("mistralai/Mistral-7B-v0.3").sliding_window is None
    assert read_config("mistralai/Mistral-7B-v0.1").sliding_window == 4096


def test_a_folder_takes_precedence_over_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "meta-llama/Llama-3.1-8B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    monkeypatch.chdir(tmp_path)
    assert read_config("meta-llama/Llama-3.1-8B").num_hidden_layers == 3


def test_a_model_in_the_cache_of_the_hub_is_used_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    monkeypatch.setattr("memfit.jobs.huggingface.cached_folder", lambda _: tmp_path)
    assert read_config("mine/some-model").num_hidden_layers == 3


def test_an_unknown_name_gets_similar_ones_and_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["plan", "hf:meta-llama/Lama-3.1-8B", "--on", "A100-80GB-SXM"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "no Hugging Face configuration 'meta-llama/Lama-3.1-8B'" in error
    assert "`memfit list models` lists, such as meta-llama/Llama-3.1-8B or " in error
    assert "hf download meta-llama/Lama-3.1-8B config.json --local-dir FOLDER" in error


def test_without_transformers_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"which cannot be imported.*pip install transformers"):
        load(JobRef(spec="hf:meta-llama/Llama-3.1-8B"))


def test_a_model_type_that_transformers_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.SimpleNamespace(CONFIG_MAPPING={"llama": None}, __version__="4.50.0")
    monkeypatch.setitem(sys.modules, "transformers", older)
    message = r"hf:openai/gpt-oss-20b is of the model type gpt_oss, which transformers 4\.50\.0 does not have"
    with pytest.raises(UserError, match=message + "; pip install --upgrade transformers"):
        read_config("gpt-oss-20b")


def test_the_models_of_the_linter_have_the_shapes_of_the_table() -> None:
    compared = 0
    for model in MODELS:
        found = described_models.of_hub(model.name, "a.yml", None)
        assert found is not None
        assert found.job
        kind, _, settings = found.job.removeprefix("hf:").partition("?")
        if not settings:
            continue
        assert kind == model.model_type
        for key, value in urllib.parse.parse_qsl(settings):
            if key in model.settings:
                assert json.loads(value) == model.settings[key], (model.name, key)
        compared += 1
    assert compared >= 30


def test_the_list_of_models_names_every_model_and_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["list", "models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in listed] == [model.name for model in MODELS]
    assert all(model["source"] and model["parameters"]["source"] for model in listed)
    assert app.main(["list", "models", "mixtral-8x7b-v0.1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"num_local_experts +8\b", shown)
    assert "Settings: config.json of the repository on huggingface.co" in shown
    assert app.main(["list", "models", "mixtral-8x7"]) == 2
    assert "did you mean mistralai/Mixtral-8x7B-v0.1" in capsys.readouterr().err


SMALL_T5 = "hf:t5-small?num_layers=2&num_decoder_layers=2&d_model=32&d_ff=64&d_kv=8&num_heads=4&vocab_size=64"
SMALL_WHISPER = (
    "hf:openai/whisper-tiny?d_model=32&encoder_layers=1&decoder_layers=1&encoder_attention_heads=4"
    "&decoder_attention_heads=4&encoder_ffn_dim=64&decoder_ffn_dim=64&max_source_positions=20"
)
SMALL_VIT = (
    "hf:google/vit-base-patch16-224?hidden_size=32&num_hidden_layers=1&num_attention_heads=4"
    "&intermediate_size=64&image_size=32"
)


@pytest.mark.parametrize(
    ("ref", "shapes"),
    [
        (
            JobRef(spec=SMALL_T5, batch=2, length=12, dimensions={"target": 5}),
            {"input_ids": (2, 12), "labels": (2, 5)},
        ),
        (JobRef(spec=SMALL_WHISPER, batch=2, length=7), {"input_features": (2, 80, 40), "labels": (2, 7)}),
        (JobRef(spec=SMALL_VIT, batch=2), {"pixel_values": (2, 3, 32, 32), "labels": (2,)}),
    ],
)
def test_encoder_decoders_speech_and_image_models_train(
    ref: JobRef, shapes: dict[str, tuple[int, ...]]
) -> None:
    job = load(ref)
    batch = job.make_batch(0, 0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
    loss, norm = TrainingStep(job, Plan()).run(batch)
    assert loss.isfinite()
    assert norm > 0
    assert "batch" in {dimension.name for dimension in job.dimensions}


def test_the_target_of_an_encoder_decoder_is_as_long_as_its_source_by_default() -> None:
    job = load(JobRef(spec=SMALL_T5, batch=2, length=12))
    assert job.make_batch(0, 0)["labels"].shape == (2, 12)
    assert job.tokens_per_batch == 24
    assert {d.name: d.value for d in job.dimensions} == {"batch": 2, "length": 12, "target": 12, "hidden": 32}


def test_what_the_data_of_a_model_do_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"trains on images, which have no --length; .*\?image_size=224"):
        load(JobRef(spec=SMALL_VIT, length=64))
    with pytest.raises(UserError, match="no dimension 'target'; allowed: --batch, --length, --dim layers"):
        load(JobRef(spec="hf:llama", dimensions={"target": 4}))
    assert [d.name for d in load(JobRef(spec="hf:swin")).dimensions] == ["batch"]
    with pytest.raises(UserError, match="allowed: 1 to 448 tokens"):
        load(JobRef(spec="hf:openai/whisper-tiny", length=449))
    with pytest.raises(UserError, match=r"no head for which memfit has a loss.* such as CLIP"):
        load(JobRef(spec="hf:clip"))
