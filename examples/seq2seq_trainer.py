"""T5, PEFT and transformers' Seq2SeqTrainer: a new LoRA on top of earlier ones.

The earlier adapters stay active and frozen while the new one trains; PEFT adds up their outputs.
Run it once for a first adapter, then again with the folders of the earlier ones:

    python examples/seq2seq_trainer.py --name first --output runs/t5
    python examples/seq2seq_trainer.py --name second --earlier runs/t5/first --output runs/t5

With the two lines marked `# sapt_fast` all adapters of a layer run in one pass. Without them PEFT
runs one after the other; the numbers are the same.
"""

import argparse
import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import sapt_fast  # sapt_fast

DATA = Path(__file__).parent / "data" / "dates.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="google/flan-t5-small", help="name or folder of a T5")
    parser.add_argument("--data", type=Path, default=DATA, help='JSON list of {"input", "output"}')
    parser.add_argument(
        "--output", type=Path, default=Path("runs/t5"), help="folder for the adapters"
    )
    parser.add_argument("--name", default="new", help="name of the adapter to train")
    parser.add_argument(
        "--earlier", nargs="*", type=Path, default=[], help="folders of adapters that stay frozen"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of input and output")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the rows to score")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForSeq2SeqLM.from_pretrained(options.model)

    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config, adapter_name=options.name)
    for folder in options.earlier:
        model.load_adapter(folder, adapter_name=folder.name)
    model.base_model.set_adapter([options.name, *(folder.name for folder in options.earlier)])
    for folder in options.earlier:
        model.set_requires_grad(folder.name, False)
    model = sapt_fast.patch(model)  # sapt_fast
    model.print_trainable_parameters()

    rows = json.loads(options.data.read_text(encoding="utf-8"))
    encoded = [
        tokenizer(
            row["input"],
            text_target=row["output"],
            truncation=True,
            max_length=options.max_length,
        )
        for row in rows
    ]
    held_out = max(1, round(options.held_out * len(encoded)))
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(options.output / "trainer"),
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            predict_with_generate=True,
            generation_max_length=32,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=encoded[held_out:],
        eval_dataset=encoded[:held_out],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()

    prediction = trainer.predict(encoded[:held_out])
    ids = prediction.predictions.clip(min=0)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for row, text in zip(rows[:held_out], texts, strict=True):
        print(f"{row['input']!r} -> {text!r}, expected {row['output']!r}")
    print(f"loss on {held_out} held-out rows: {prediction.metrics['test_loss']:.6f}")
    model.save_pretrained(options.output, selected_adapters=[options.name])
    print(f"adapter {options.name!r} written to {options.output / options.name}")


if __name__ == "__main__":
    main()
