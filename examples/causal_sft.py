"""Supervised fine-tuning of a causal model with PEFT: the loss is on the completions alone.

Two LoRAs train together: one of higher rank in the attention, one of lower rank in every linear
layer. Either can be left out later; rank-stabilised scaling (rsLoRA) keeps them comparable. The
data are rows of a prompt and a completion, as for TRL's SFTTrainer.

    python examples/causal_sft.py --output runs/sft

With the two lines marked `# sapt_fast` all adapters of a layer run in one pass. Without them PEFT
runs one after the other; the numbers are the same.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sapt_fast  # sapt_fast

DATA = Path(__file__).parent / "data" / "capitals.jsonl"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="Qwen/Qwen2.5-0.5B", help="name or folder of a LLaMA-like model"
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help='one {"prompt", "completion"} in JSON a line'
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/sft"), help="folder for the adapters"
    )
    parser.add_argument("--attention-rank", type=int, default=16)
    parser.add_argument("--everywhere-rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2, help="batches of one step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a whole row")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the rows to score")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def encode(tokenizer, row: dict[str, str], longest: int) -> dict[str, list[int]]:
    """Token ids of a row; labels are -100 on the prompt, which then counts for no loss."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    completion.append(tokenizer.eos_token_id)
    ids = (prompt + completion)[:longest]
    labels = ([-100] * len(prompt) + completion)[:longest]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.model)

    common = {"lora_alpha": 16, "use_rslora": True, "task_type": "CAUSAL_LM"}
    attention = LoraConfig(r=options.attention_rank, target_modules=ATTENTION, **common)
    everywhere = LoraConfig(
        r=options.everywhere_rank, target_modules=ATTENTION + FEED_FORWARD, **common
    )
    model = get_peft_model(base, attention, adapter_name="attention")
    model.add_adapter("everywhere", everywhere)
    model.base_model.set_adapter(["attention", "everywhere"])
    model = sapt_fast.patch(model)  # sapt_fast
    model.print_trainable_parameters()

    lines = options.data.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    encoded = [encode(tokenizer, row, options.max_length) for row in rows]
    held_out = max(1, round(options.held_out * len(rows)))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "trainer"),
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=encoded[held_out:],
        eval_dataset=encoded[:held_out],
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()

    print(f"loss on {held_out} held-out rows: {trainer.evaluate()['eval_loss']:.6f}")
    model.eval()
    for row in rows[:held_out]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                **prompt.to(model.device),
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{row['prompt']!r} -> {text!r}, expected {row['completion']!r}")
    model.save_pretrained(options.output)
    print(f"adapters {', '.join(model.peft_config)} written to {options.output}")


if __name__ == "__main__":
    main()
