"""Pretrain the demo's backbone and write the files that the package ships.

About ten minutes on one core. A run that was stopped continues from its last checkpoint when it
is started again with the same arguments; batches depend on the seed and the step alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import T5ForConditionalGeneration

from sapt_fast.demo.backbone import collate, exact_match, new_backbone, save_backbone
from sapt_fast.demo.tasks import (
    PRETRAINING_RULES,
    make_example,
    pretraining_batch,
    random_payload,
)

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
WARMUP_STEPS = 300
DECAY_SHARE = 0.6
LOG_EVERY = 500
HELD_OUT_ROWS = 100


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "sapt_fast" / "demo" / "backbone")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ROOT / "build" / "demo_backbone.pt",
        help="where to save the state of the run; removed when the run is complete",
    )
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser.parse_args()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then linear decay to zero over the last 60% of the run."""
    remaining = (steps - step) / steps
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, remaining / DECAY_SHARE)


def rule_scores(model: T5ForConditionalGeneration) -> dict[str, float]:
    """Exact match by rule on rows drawn apart from the training batches."""
    rng = random.Random("held out")
    return {
        name: exact_match(
            model,
            [make_example(rule, random_payload(rng), rng) for _ in range(HELD_OUT_ROWS)],
        )
        for name, rule in PRETRAINING_RULES.items()
    }


def log_scores(step: int, model: T5ForConditionalGeneration) -> None:
    """Log the mean and the three lowest exact matches."""
    scores = rule_scores(model)
    worst = sorted(scores.items(), key=lambda item: item[1])[:3]
    mean = sum(scores.values()) / len(scores)
    logger.info(
        "step %d: mean exact match %.3f, lowest %s",
        step,
        mean,
        ", ".join(f"{name} {score:.2f}" for name, score in worst),
    )


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Replace the checkpoint at `path` in one step, so that a stop cannot tear it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace) -> T5ForConditionalGeneration:
    """Run or continue the pretraining; returns the trained model."""
    settings = {
        key: getattr(args, key)
        for key in ("seed", "steps", "batch_size", "lr", "weight_decay", "clip")
    }
    model = new_backbone(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    first_step = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{args.checkpoint} was made with {state['settings']}, this run has {settings}: "
                "pass the same arguments or another --checkpoint"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        logger.info("continuing at step %d", first_step)
    bar = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(step, args.steps)
        batch = collate(pretraining_batch(args.seed, step, args.batch_size))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if done % LOG_EVERY == 0:
            log_scores(done, model)
        if done % args.checkpoint_every == 0:
            save_checkpoint(
                args.checkpoint,
                {
                    "settings": settings,
                    "step": done,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
    return model


def main() -> None:
    """Pretrain, then write the packaged files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args()
    torch.set_num_threads(args.threads)
    with logging_redirect_tqdm():
        model = train(args)
    save_backbone(model, args.out)
    args.checkpoint.unlink(missing_ok=True)
    logger.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
