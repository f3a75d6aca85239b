"""A plain PyTorch loop with accelerate: a text classifier whose LoRAs learn at different speeds.

There is one LoRA for each learning rate, and all are active: the fast one finds a rough answer, the
slow ones refine it. The new classification head trains and is saved with the first LoRA
(`modules_to_save`).

    python examples/accelerate_loop.py --learning-rates 1e-2 1e-3 1e-4 --output runs/reviews
    accelerate launch --mixed_precision bf16 examples/accelerate_loop.py

With the two lines marked `# sapt_fast` all adapters of a layer run in one pass. Without them PEFT
runs one after the other; the numbers are the same.
"""

import argparse
import csv
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import sapt_fast  # sapt_fast

DATA = Path(__file__).parent / "data" / "reviews.csv"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="google-bert/bert-base-uncased", help="name or folder of a BERT"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="CSV with columns text and label")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reviews"), help="folder for the adapters"
    )
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[1e-2, 1e-3, 1e-4], help="one per LoRA"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the rows to score")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    set_seed(options.seed)
    with options.data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))

    names = [f"lora{number}" for number in range(len(options.learning_rates))]
    lora = {"r": options.rank, "lora_alpha": 2 * options.rank}
    first = LoraConfig(modules_to_save=["classifier"], **lora)
    model = get_peft_model(base, first, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**lora))
    model.base_model.set_adapter(names)
    model = sapt_fast.patch(model)  # sapt_fast

    encoded = [
        {
            **tokenizer(row["text"], truncation=True, max_length=options.max_length),
            "labels": labels.index(row["label"]),
        }
        for row in rows
    ]
    held_out = max(1, round(options.held_out * len(encoded)))
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(
        encoded[held_out:], batch_size=options.batch_size, shuffle=True, collate_fn=collate
    )
    test = DataLoader(encoded[:held_out], batch_size=options.batch_size, collate_fn=collate)

    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trainable.items() if name in n.split(".")], "lr": rate}
        for name, rate in zip(names, options.learning_rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    accelerator = Accelerator()  # not before the model is loaded: ZeRO-3 would load it in pieces
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)

    progress = tqdm(total=options.epochs * len(train), disable=not accelerator.is_main_process)
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            progress.update()
        accelerator.print(f"epoch {epoch + 1}: loss {total / len(train):.6f}")
    progress.close()

    model.eval()
    right = []
    for batch in test:
        with torch.no_grad():
            chosen = model(**batch).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(chosen == batch["labels"]))
    accelerator.print(
        f"accuracy on {held_out} held-out rows: {torch.cat(right).float().mean():.4f}"
    )
    state = accelerator.get_state_dict(model)  # which all processes gather if it is sharded
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output, state_dict=state)
    accelerator.wait_for_everyone()
    accelerator.print(f"adapters {', '.join(names)} written to {options.output}")


if __name__ == "__main__":
    main()
