"""transformers' Trainer: a small BERT on text loses 40% of the hidden channels of its MLPs while it trains.

pip install 'pruningawaretraining[transformers,accelerate]'
python examples/transformers_text.py                             # on texts that scikit-learn ships: a minute
python examples/transformers_text.py --train sst2_train.tsv.xz --test sst2_dev.tsv.xz
python examples/transformers_text.py --resume runs/transformers/checkpoint-200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from pruningawaretraining import save_pruned
from pruningawaretraining.integrations.transformers import PruningCallback

sys.path.insert(0, str(Path(__file__).parent))
from text import PAD, Texts, described_sets, numbered, read_lines

RULE = {
    "layers": [r"re:.*intermediate\.dense"],
    "criterion": "taylor",
    "start": 3, "end": 6, "target": {"sparsity": 0.4}, "scope": "local",
}  # fmt: skip


class Data(torch.utils.data.Dataset[dict[str, Any]]):
    """Texts one by one."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"words": self.texts.words[number], "labels": self.texts.labels[number]}


def batch_of(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Texts of unlike length together."""
    longest = max(len(one["words"]) for one in examples)
    words = torch.tensor([one["words"] + [PAD] * (longest - len(one["words"])) for one in examples])
    labels = torch.tensor([one["labels"] for one in examples])
    return {"input_ids": words, "attention_mask": (words != PAD).long(), "labels": labels}


def main(arguments: list[str] | None = None) -> PruningCallback:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="lines of label, tab, text; without it, descriptions of data sets")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--resume", type=Path, help="a checkpoint's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    args = parser.parse_args(arguments)
    lines = (read_lines(args.train), read_lines(args.test)) if args.train else described_sets()
    train, test, words, labels = numbered(*lines)
    set_seed(0)
    config = BertConfig(
        vocab_size=words, num_labels=labels, hidden_size=args.width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=4 * args.width, max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    inputs = {"input_ids": torch.ones(1, 16, dtype=torch.int64), "attention_mask": torch.ones(1, 16, dtype=torch.int64)}
    callback = PruningCallback({"rules": [RULE]}, inputs, resume_from=args.resume)
    options = TrainingArguments(
        output_dir=str(args.out), num_train_epochs=args.epochs, learning_rate=5e-4, max_grad_norm=1.0, bf16=True,
        use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=8, gradient_accumulation_steps=2,
        per_device_eval_batch_size=64, eval_strategy="epoch", save_strategy="epoch", logging_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model,
        options,
        data_collator=batch_of,
        train_dataset=Data(train),
        eval_dataset=Data(test),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=None if args.resume is None else str(args.resume))
    reached = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {reached:.4f}, sparsity {callback.pruner.sparsity:.4f}, phase {callback.pruner.phase}")
    save_pruned(model, args.out / "pruned.safetensors")
    return callback


if __name__ == "__main__":
    main()
