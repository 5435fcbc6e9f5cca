"""A Hugging Face Trainer, and the memory of its step before ``trainer.train()``."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import memfit


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """32 rows of 128 tokens; the labels are the tokens themselves."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 2048, (128,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder: str, **arguments: object) -> Trainer:
    """A Llama of 1.8 million random parameters; ``arguments`` go to TrainingArguments."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        use_cache=False,
    )
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments,  # type: ignore[arg-type]
    )
    return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=RandomTokens())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, bf16=True, gradient_accumulation_steps=2)
        print(memfit.from_trainer(trainer))
        print(memfit.from_trainer(trainer, machine="RTX-4090"))
