"""Memorises facts: chooses their experts, trains group after group, and adds them at the end."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sapt_fast.methods.edits.handle import Pair, evaluating
from sapt_fast.methods.memory.facts import Memorised
from sapt_fast.methods.memory.fitting import FactTexts, Outcome, Trainer
from sapt_fast.methods.memory.folder import FactFolder, Group
from sapt_fast.methods.memory.groups import packed, parts_of
from sapt_fast.pools.collectives import Share
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS
from sapt_fast.sites.memory import FactLookup
from sapt_fast.storage.tensors import tensor_bytes

__all__ = ["Memorising"]

logger = logging.getLogger(__name__)

_SAME = 1e-3  # keys of length 1 that are nearer cannot be told apart
_CHUNK = 1024


class _Plan(NamedTuple):
    experts: Tensor  # [A, K] of all facts, those that are there before the given ones
    weights: Tensor  # [A, K]


class Memorising:
    """One call of `model.mome.memorise`.

    Args:
        handle: `model.mome`.
        pairs: prompts and targets; a prompt that is given twice has the same target.
        until, batch_size: as in `memorise`.
    """

    def __init__(self, handle: Any, pairs: Sequence[Pair], until: float, batch_size: int) -> None:
        self.handle = handle
        self.config = handle.config
        self.until = until
        self.batch_size = batch_size
        present, targets = handle.present(), dict(handle.numbered())
        self.known: dict[int, int] = {}  # the fact that each given one is already, by its place
        self.places: list[int] = []  # of those that are trained
        firsts: dict[tuple[int, ...], int] = {}
        # The place of the same prompt in the list, for each given fact.
        self.first = [firsts.setdefault(tuple(p.tolist()), i) for i, (p, _) in enumerate(pairs)]
        self.replaced: list[int] = []  # facts whose prompts get other targets
        for place, (prompt, target) in enumerate(pairs):
            if self.first[place] != place:
                continue
            fact = present.get(tuple(prompt.tolist()))
            if fact is not None and targets[fact][1] == tuple(target.tolist()):
                self.known[place] = fact
                continue
            self.places.append(place)
            if fact is not None:
                self.replaced.append(fact)
        self.pairs = [pairs[place] for place in self.places]
        self.held = [fact for fact in targets if fact not in self.replaced]
        self.held_pairs: list[Pair] = [
            (torch.tensor(prompt), torch.tensor(target))
            for prompt, target in (targets[fact] for fact in self.held)
        ]

    def run(self, folder: FactFolder | None, progress: bool) -> Memorised:
        """Trains the facts, and adds them to the memory; see `MomeHandle.memorise`."""
        handle, begun, spent = self.handle, time.monotonic(), 0.0
        count = len(self.pairs)
        outcome, numbers = Outcome(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0), []
        if count:
            with evaluating(handle._model), handle.listening():
                keys = self._keys()
                plan = self._plan(keys)
                with self._undone_on_error(plan):
                    outcome, spent = self._train(plan, folder, progress)
                    experts = None if plan is None else plan.experts[-count:]
                    numbers = handle.add_facts(self.pairs, keys, experts, self.replaced)
        facts = self.known | dict(zip(self.places, numbers, strict=True))
        losses = dict(zip(self.places, outcome.losses.tolist(), strict=True))
        unfitted = [n for n, fits in zip(numbers, outcome.fits.tolist(), strict=True) if not fits]
        if unfitted:
            logger.warning(
                "memorise: %d of %d facts do not reach the loss %g within %d epochs: %s; forget "
                "them, or allow more epochs, another learning_rate or more experts",
                len(unfitted), count, self.until, self.config.epochs, unfitted[:20],
            )  # fmt: skip
        return Memorised(
            [facts[place] for place in self.first],
            [losses.get(place, math.nan) for place in self.first],
            unfitted,
            outcome.epochs,
            handle.collisions,
            spent + time.monotonic() - begun,
        )

    def description(self) -> dict[str, Any]:
        """Returns what a folder must be of, JSON-ready."""
        handle = self.handle
        texts = [[t.tolist() for t in pair] for pair in (*self.held_pairs, *self.pairs)]
        state = {
            f"{part}.{name}": tensor.cpu()
            for part, module in handle.parts().items()
            for name, tensor in module.state_dict().items()
        }
        group = handle.shards.group
        return {
            "config": handle.config.to_dict(),
            "process": [group.rank, group.size],
            "until": self.until,
            "batch_size": self.batch_size,
            "facts before": len(self.held),
            "facts": sha256(json.dumps(texts).encode()).hexdigest(),
            "router, keys and experts": sha256(tensor_bytes(state)).hexdigest(),
        }

    # --- before training ---

    def _keys(self) -> Tensor | None:
        """Returns what the given prompts are looked up by, [F, C]; None if each token looks up."""
        keys = self.handle.queries([prompt for prompt, _ in self.pairs])
        if keys is None:
            return None
        keys = self.handle.shards.group.first(keys)
        wrong = (~keys.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"facts: got NaN or infinity as what fact {self.places[wrong[0]]} is looked up by, "
                "expected finite numbers"
            )
        return keys

    def _plan(self, keys: Tensor | None) -> _Plan | None:
        """Chooses the experts of all facts; None if each token looks up.

        Raises:
            ValueError: if facts contradict each other, or there are more than experts.
        """
        lookup, count = self.handle.lookup, len(self.held) + len(self.pairs)
        if keys is None:
            return None
        if not isinstance(lookup, FactLookup):
            held = self.handle.queries([prompt for prompt, _ in self.held_pairs])
            found = lookup.decide(keys if held is None else torch.cat([held, keys]))
            return _Plan(found["experts"], found["weights"])
        if count > self.config.num_experts:
            raise ValueError(
                f"facts: got {count} with those that are there, expected at most "
                f"{self.config.num_experts} (num_experts)"
            )
        numbers = torch.tensor(self.held, dtype=torch.int64, device=keys.device)
        self._require_apart(torch.cat([self.handle.keys_of(numbers).to(keys), keys]))
        new = lookup.table.choose_experts(len(self.pairs), numbers)
        experts = torch.cat([lookup.table.experts_of(numbers), new])
        uses = torch.bincount(experts.flatten(), minlength=self.config.num_experts)
        sharing = (uses[experts] > 1).any(1)
        if sharing.any():
            logger.warning(
                "num_experts: %d facts with %d experts each are more than the %d experts hold: "
                "%.0f%% of the facts share experts, and may disturb each other",
                count, self.config.k, self.config.num_experts, 100 * float(sharing.float().mean()),
            )  # fmt: skip
        return _Plan(experts, lookup.weights_of(keys.new_ones(count)))

    def _require_apart(self, keys: Tensor) -> None:
        """Raises ValueError if a given fact has the key [C] of one with another target."""
        first, pairs = len(self.held), [*self.held_pairs, *self.pairs]
        for start in range(first, len(keys), _CHUNK):
            near = keys[start : start + _CHUNK] @ keys.T > 1 - _SAME
            for i, other in near.nonzero().tolist():
                one = start + i
                apart = float((keys[one].double() - keys[other].double()).norm()) > _SAME
                if one == other or apart or torch.equal(pairs[one][1], pairs[other][1]):
                    continue
                shown = [self.handle.shown(pairs[n][0].tolist()) for n in (one, other)]
                raise ValueError(
                    f"facts: {shown[0]} has the same key as {shown[1]}, whose target differs, so "
                    "that the two contradict each other; change a prompt, or key_layer, components "
                    "or pattern in MomeConfig"
                )

    # --- training ---

    def _train(
        self, plan: _Plan | None, folder: FactFolder | None, progress: bool
    ) -> tuple[Outcome, float]:
        """Returns what became of the given facts, and the seconds of groups from the folder."""
        first, count, banks = len(self.held), len(self.pairs), self.handle.banks
        losses, fits = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        epochs, spent = 0, 0.0
        with tqdm(total=count, desc="facts", disable=not progress) as bar:
            for number, group in enumerate(self._groups(plan)):
                found = self._loaded(folder, number, banks)
                if found is None:
                    begun = time.monotonic()
                    outcome = self._train_group(group, plan)
                    found = Group(outcome, time.monotonic() - begun)
                    if folder is not None:
                        ids = None if plan is None else plan.experts[group].unique()
                        kept = None if ids is None else self.handle.shards.kept(ids)
                        folder.save(number, found, banks, kept)
                else:
                    spent += found.seconds
                own = [i for i, fact in enumerate(group) if fact >= first]
                at = [group[i] - first for i in own]
                losses[at], fits[at] = found.outcome.losses[own], found.outcome.fits[own]
                epochs = max(epochs, found.outcome.epochs)
                bar.update(len(own))
        return Outcome(losses, fits, epochs), spent

    def _loaded(
        self, folder: FactFolder | None, number: int, banks: Sequence[ExpertBank]
    ) -> Group | None:
        """Returns a group whose experts are put into the banks, if all processes have it."""
        together = self.handle.shards.group
        if folder is None or not all(together.values(folder.has(number))):
            return None
        found: Group = together.together(lambda: folder.load(number, banks))
        return found

    def _groups(self, plan: _Plan | None) -> list[list[int]]:
        """Returns the facts of each group, those that are there counted before the given ones."""
        first = len(self.held)
        if plan is None:
            return [[*range(first + len(self.pairs))]]
        parts = [part for part in parts_of(plan.experts) if part[-1] >= first]
        return packed(parts, self.batch_size)

    def _train_group(self, group: Sequence[int], plan: _Plan | None) -> Outcome:
        handle, config = self.handle, self.config
        pairs, layers, name = [*self.held_pairs, *self.pairs], handle.layers, handle.prompts.name
        batches = []
        for start in range(0, len(group), self.batch_size):
            whole = group[start : start + self.batch_size]
            share = Share(len(whole), handle.shards.group)
            rows = [whole[row] for row in share.rows]
            decided = None
            if plan is not None:
                decided = {
                    f"{name}:experts": plan.experts[rows],
                    f"{name}:weights": plan.weights[rows],
                }
            texts = handle.batch([pairs[i] for i in rows])
            batches.append(FactTexts(texts, handle.prompts, next(iter(layers)), decided, share))
        kind, rate = ROW_OPTIMIZERS[config.optimizer], config.learning_rate
        slots = config.slots and (config.slots, [use.slots() for use in handle.uses])
        trainer = Trainer(
            [*layers.values()], lambda bank: kind(bank, lr=rate), self.until, config.epochs,
            handle.shards, slots,
        )  # fmt: skip
        outcome = trainer.train(batches)
        return outcome._replace(losses=outcome.losses.cpu(), fits=outcome.fits.cpu())

    @contextmanager
    def _undone_on_error(self, plan: _Plan | None) -> Iterator[None]:
        """A context after whose error experts, keys and facts are as before."""
        handle, lookup = self.handle, self.handle.lookup
        state, saved = handle._state(), []
        if isinstance(lookup, FactLookup):
            state = copy.deepcopy(state)  # keys change in place
        replaced = torch.tensor(self.replaced, dtype=torch.int64, device=lookup.table.facts.device)
        changing = lookup.table.experts_of(replaced).flatten()
        for bank in handle.banks:
            stored = bank.touched
            if plan is not None:
                ids = torch.cat([plan.experts.flatten().to(stored), changing.to(stored)])
                stored = stored[torch.isin(stored, handle.shards.kept(ids))]
            saved.append((bank, bank.touched.clone(), stored.clone(), bank.master_rows(stored)))
        try:
            yield
        except BaseException:
            for bank, before, ids, rows in saved:
                now = bank.touched
                bank.reset_rows(now[~torch.isin(now, before)])
                bank.write(ids, *rows)
            handle._restore_state(state)
            raise
