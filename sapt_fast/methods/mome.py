"""MoME: facts memorised in experts that an index finds, while the model stays frozen.

Li et al., "Banishing LLM Hallucinations Requires Rethinking Generalization", arXiv 2406.17642
(Lamini Memory Tuning, 2024). No code of it is public; what the paper leaves open is our choice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.checks import require_count, require_number
from sapt_fast.methods.edits.handle import Pair
from sapt_fast.methods.edits.inputs import read_edits, read_prompt
from sapt_fast.methods.edits.sites import device_of, in_decoder
from sapt_fast.methods.edits.texts import kind_of
from sapt_fast.methods.memory.background import BackgroundUse
from sapt_fast.methods.memory.building import make_bank, make_lookup, make_shards
from sapt_fast.methods.memory.config import MomeConfig
from sapt_fast.methods.memory.facts import Fact, Memorised, Recalled
from sapt_fast.methods.memory.folder import FactFolder
from sapt_fast.methods.memory.keys import fit_keys
from sapt_fast.methods.memory.memorising import Memorising
from sapt_fast.methods.memory.recalling import recall
from sapt_fast.methods.memory.router import MemoryRouter
from sapt_fast.methods.memory.saved import SavedMemory
from sapt_fast.methods.memory.sites import memory_targets, memory_widths
from sapt_fast.pools.sharded_index import ShardedIndex
from sapt_fast.sites.features import HiddenMean
from sapt_fast.sites.memory import FactLookup, Lookup, MemoryOutput
from sapt_fast.sites.output import find_outputs
from sapt_fast.sites.report import PatchReport

__all__ = ["MomeConfig", "MomeHandle"]

_BATCH = 32  # prompts whose queries are computed together


class MomeHandle(SavedMemory):
    """`model.mome`: facts, each in a few experts of a large bank.

        y' = y + s sum_j g_j B_j A_j x,  j the experts of the fact nearest to the prompt

    y is the output of a layer and x its input. A prompt is looked up once, by the mean of its
    hidden states at a low layer, centred and projected on principal components (`fit_router`). The
    experts act on the prompt's last token and on all that follow. A prompt whose best key has too
    low a score gives the same bits as before.

    The model stays frozen, and so do keys and router once facts are memorised. Facts that share no
    expert do not disturb each other.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.mome import MomeConfig
        >>> config = MomeConfig(num_experts=64, k=4, components=3, epochs=300)
        >>> model = sapt_fast.patch(load_backbone(), config)
        >>> model.mome.fit_router([[5, 9], [8, 4, 7], [30, 31], [40], [22, 23]])
        >>> report = model.mome.memorise([([5, 6, 7], [9, 1]), ([8, 7, 6], [10, 1])])
        >>> report.unfitted
        []
        >>> model.mome.experts_of([5, 6, 7]).fact
        0
        >>> model.mome.forget(0)
        >>> len(model.mome.facts)
        1
    """

    Config = MomeConfig
    method = "mome"
    attribute = "mome"

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.router = MemoryRouter(model.device)
        self._banks = nn.ModuleList()
        self._lookups = nn.ModuleList()
        self._uses = nn.ModuleList()
        self.shards = make_shards(config)
        self.prompts.together = self.shards.group.size > 1
        if self.looks_up_by_tokens:
            self.prompts.query = self._query_of

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Finds the layers; raises ValueError if none match, or there is no low layer."""
        targets = config.target_modules
        report = find_outputs(model, memory_targets(model) if targets is None else targets)
        order = {path: place for place, (path, _) in enumerate(model.named_modules())}

        def end(path: str) -> tuple[int, int]:  # a layer inside another one ends first
            return max(order[p] for p in order if f"{p}.".startswith(f"{path}.")), -len(path)

        report.patched.sort(key=end)
        if config.query == "sequence":
            HiddenMean(model, config.key_layer)
        return report

    def make(self, path: str) -> MemoryOutput:
        """Returns the module for a layer, with its bank."""
        config, model = self.config, self._model
        layer = model.get_submodule(path)
        widths, device = memory_widths(layer, path), device_of(layer, path)
        inside = in_decoder(model, path)
        alike = [other for other in self.report.patched if in_decoder(model, other) == inside]
        first = self.report.patched[0] == path
        per_token = config.query == "token"
        if first or not config.shared:
            self._banks.append(make_bank(config, widths, device))
            if config.slots is not None:
                self._uses.append(BackgroundUse(config.num_experts, device))
        if first or per_token:
            self._lookups.append(make_lookup(config, widths[0], device, self.shards))
        own = self.banks[-1]
        if (own.in_features, own.out_features) != widths:
            raise ValueError(
                f"shared: got True for {path} of widths {widths}, expected those of the first "
                f"layer, {(own.in_features, own.out_features)}"
            )
        bank: Any = self._banks[-1]
        lookup: Any = self._lookups[-1]
        replacement = "generation" if kind_of(model) == "causal" or inside else "replace_all"
        return MemoryOutput(
            path, self.prompts, inside, lookup, bank, config.scaling, replacement, per_token,
            decides=path == alike[0],
        )  # fmt: skip

    # --- what there is ---

    @property
    def layers(self) -> dict[str, MemoryOutput]:
        """The layers with memory by path, in the order in which they run."""
        return self.modules_at()

    @property
    def lookup(self) -> Lookup:
        """What finds experts, at the first layer."""
        found: Any = self._lookups[0]
        return found

    @property
    def looks_up_by_tokens(self) -> bool:
        """Whether prompts are looked up by a function of their tokens."""
        return bool(self.config.query == "sequence")

    @property
    def lookups(self) -> list[Lookup]:
        """What finds experts: one for all layers, or one for each where tokens look up."""
        found: list[Any] = list(self._lookups)
        return found

    @property
    def lowest(self) -> str:
        """The path of the lowest layer with memory."""
        return self.report.patched[0]

    def parts(self) -> dict[str, nn.Module]:
        """Returns the modules whose buffers are the method's state, the banks excepted, by name."""
        parts: dict[str, nn.Module] = {"router": self.router}
        parts |= {f"lookup.{place}": lookup for place, lookup in enumerate(self._lookups)}
        return parts | {f"use.{place}": use for place, use in enumerate(self._uses)}

    @property
    def uses(self) -> list[BackgroundUse]:
        """How often the router's prompts use the experts of each bank, if `slots` is set."""
        found: list[Any] = list(self._uses)
        return found

    @property
    def sharded_index(self) -> ShardedIndex | None:
        """The keys of a sharded memory; None of another one."""
        index: Any = self.lookup.index
        return index if isinstance(index, ShardedIndex) else None

    @property
    def facts(self) -> list[Fact]:
        """The facts that are memorised, oldest first."""
        table: Any = self.lookup.table
        experts = [tuple(n for n in row if n >= 0) for row in table.experts.tolist()]
        rows = zip(self.numbered(), experts, strict=True)
        return [Fact(fact, *text, own, self.tokenizer) for (fact, text), own in rows]

    @property
    def collisions(self) -> float:
        """The share of facts with an expert that another fact has; 0 without facts."""
        table: Any = self.lookup.table
        return float(table.sharing().float().mean()) if len(table) else 0.0

    # --- the router ---

    def fit_router(self, data: Sequence[Any]) -> None:
        """Fits what prompts are looked up by, once; it is frozen afterwards.

        Args:
            data: many different prompts (tokens or, with a tokenizer, text), more than
                `components`, best others than those of the facts. With learned or product keys,
                pairs (prompt, target), on which keys are trained too.

        Raises:
            TypeError: if a prompt is neither tokens nor text.
            ValueError: if there are facts, whose keys would no longer fit.
            ValueError: if there are too few prompts that differ.
        """
        if self.tasks:
            raise ValueError(
                f"fit_router: got a memory with {len(self.tasks)} facts, whose keys the new router "
                "would not find; forget them first, or fit another model's"
            )
        if not isinstance(data, Sequence) or isinstance(data, str) or len(data) == 0:
            raise TypeError(f"data: got {type(data).__name__}, expected a list of prompts or pairs")
        config = self.config
        pairs: list[Pair] = []
        if config.keys != "facts":
            pairs, _ = read_edits(self._model, self.tokenizer, data, None, "data")
            prompts = [prompt for prompt, _ in pairs]
        else:
            prompts = [
                read_prompt(self._model, self.tokenizer, prompt, f"data[{place}]: ")
                for place, prompt in enumerate(data)
            ]
        with torch.inference_mode(False):
            if self.looks_up_by_tokens:
                texts = [prompt.to(self._model.device) for prompt in prompts]
                self.router.fit(self._features(), texts, config.components, config.whitening)
                for name, found in self.router.named_buffers():  # the same on all processes
                    setattr(self.router, name, self.shards.group.first(found))
            if pairs:
                fit_keys(self, pairs)

    def _features(self) -> HiddenMean:
        config = self.config
        return HiddenMean(self._model, config.key_layer, self.tokenizer, config.pattern)

    @torch.compiler.disable
    def _query_of(self, texts: list[Tensor]) -> Tensor:
        """Returns what prompts are looked up by, [B, C], for the tokens [T_b] of each."""
        if not self.router.is_fitted:
            raise RuntimeError(
                "mome: the router is not fitted; call model.mome.fit_router(prompts)"
            )
        return self.router.query(self._features(), texts)

    def queries(self, prompts: Sequence[Tensor]) -> Tensor | None:
        """Returns what the tokens [T_n] of prompts are looked up by, [N, C], in small batches.

        None if each token looks up by itself.

        Raises:
            RuntimeError: before `fit_router`.
        """
        if not self.looks_up_by_tokens or not prompts:
            return None
        texts = [prompt.to(self._model.device) for prompt in prompts]
        parts = [texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH)]
        return torch.cat([self._query_of(part) for part in parts])

    # --- facts ---

    def memorise(
        self,
        facts: Sequence[Any],
        until: float = 0.02,
        *,
        batch_size: int = 16,
        folder: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> Memorised:
        """Trains experts on facts until the model gives each target with a small loss.

        Facts that share no expert are trained group after group, so that the memory this takes does
        not depend on how many there are. Earlier facts that share experts with new ones are trained
        along. A prompt that is memorised already with another target gets the new one.

        Args:
            facts: pairs (prompt, target): tokens, the target to the end token that `generate` stops
                at; or, with a tokenizer, text, to whose targets the end token is added.
            until: the largest mean cross-entropy of a target's tokens.
            batch_size: facts that run through the model together.
            folder: where finished groups are saved, so that the same call resumes after a kill and
                trains the same experts. Delete it once the model is saved.
            progress: whether to show a bar. None: if the standard error is a terminal.

        Returns:
            The facts' numbers, their losses, and which of them training did not reach.

        Raises:
            TypeError: if a prompt or target is neither tokens nor text.
            ValueError: if a prompt or target is empty, or too long for the model.
            ValueError: if two facts of the list have the same prompt and different targets, or two
                facts with different targets are looked up by the same key.
            ValueError: if there are more facts than experts.
            ValueError, FileExistsError: if the folder is of another call, damaged or in use.
            RuntimeError: before `fit_router`.
            FloatingPointError: if a loss is not finite.

        Nothing has changed after an error.
        """
        with torch.inference_mode(False):
            return self._memorise(facts, until, batch_size, folder, progress)

    def _memorise(
        self, facts: Any, until: float, batch_size: int, folder: Any, progress: bool | None
    ) -> Memorised:
        if not isinstance(facts, Sequence) or isinstance(facts, str):
            raise TypeError(f"facts: got {type(facts).__name__}, expected a list of pairs")
        pairs, _ = read_edits(self._model, self.tokenizer, facts, None, "facts")
        require_number("until", until, positive=True)
        require_count("batch_size", batch_size)
        run, group = Memorising(self, pairs, until, batch_size), self.shards.group
        shown = sys.stderr.isatty() if progress is None else progress
        if group.size > 1:
            given = run.description()["facts"], until, batch_size, folder is None
            group.require_same("facts, until, batch_size, folder", given)
        if folder is None:
            return run.run(None, shown)
        path = Path(folder) / group.name
        kept = group.together(lambda: FactFolder(path, run.description()))
        try:
            return run.run(kept, shown)
        finally:
            kept.close()

    def add_facts(
        self,
        pairs: Sequence[Pair],
        keys: Tensor | None,
        experts: Tensor | None,
        replaced: Sequence[int],
    ) -> list[int]:
        """Adds facts whose experts are trained, and returns their numbers.

        Args:
            pairs: prompts and targets.
            keys: [F, C], what the prompts are looked up by; None if each token looks up.
            experts: [F, K]; None if each token looks up.
            replaced: facts that are removed; of their experts, the given ones stay as they are.
        """
        if replaced:
            self._remove(replaced, experts)
        lookup: Any = self.lookup
        table = lookup.table
        facts = self.log.add([p for p, _ in pairs], [t for _, t in pairs]).to(table.facts.device)
        rows = table.free_keys(len(facts))
        if experts is None:
            experts = rows.new_empty(len(facts), 0)
        table.add(facts, rows, experts)
        if isinstance(lookup, FactLookup):
            assert keys is not None  # facts are looked up by their prompts
            lookup.index.set_rows(rows, keys)
            lookup.index.build()
        self.follow_edits()
        numbers: list[int] = facts.tolist()
        return numbers

    def keys_of(self, facts: Tensor) -> Tensor:
        """Returns the keys [F, C] of facts [F] int64, for `keys="facts"`."""
        lookup: Any = self.lookup
        found: Tensor = lookup.index.keys_at(lookup.table.keys[lookup.table.rows_of(facts)])
        return found

    def forget(self, fact: int | Sequence[int]) -> None:
        """Removes a fact; the model answers as if it had never been memorised.

        Its experts get their start values again, unless other facts have them too. With learned or
        product keys most experts are shared, so that a part of the fact may stay.

        Args:
            fact: a number from `memorise`, or several.

        Raises:
            ValueError: if there is no such fact, or tokens look up by themselves.
        """
        facts = [fact] if isinstance(fact, int) else [*dict.fromkeys(fact)]
        unknown = sorted(set(facts) - set(self.log.edits.tolist()), key=str)
        if unknown:
            raise ValueError(
                f"fact: got {unknown[0]!r}, expected the number of one of the {len(self.tasks)} "
                "facts (model.mome.facts)"
            )
        if not self.looks_up_by_tokens:
            raise ValueError(
                "forget: not possible with query='token', where facts have no experts of their own"
            )
        with torch.inference_mode(False):
            self._remove(facts)
        self.follow_edits()

    def _remove(self, facts: Sequence[int], kept: Tensor | None = None) -> None:
        """Removes facts, and what their experts have learned except for those in `kept`."""
        lookup: Any = self.lookup
        table = lookup.table
        numbers = torch.tensor([*facts], dtype=torch.int64, device=table.facts.device)
        if isinstance(lookup, FactLookup):
            lookup.index.remove_rows(table.keys[table.rows_of(numbers)])
            lookup.index.build()
        given_up = table.remove(numbers)
        if kept is not None:
            given_up = given_up[~torch.isin(given_up, kept.to(given_up))]
        for bank in self.banks:
            bank.reset_rows(self.shards.kept(given_up))
        for fact in facts:
            self.log.remove(fact)

    def clear(self) -> None:
        """Removes all facts, keys and experts."""
        self._remove(self.log.edits.tolist())
        for bank in self.banks:
            bank.reset_rows(bank.touched.clone())
        if self.sharded_index is not None:
            local = self.sharded_index.local
            local.remove_rows(local.present_keys()[1])
            local.build()
        self.follow_edits()

    def experts_of(self, prompt: Any) -> Recalled:
        """Finds the experts of a prompt, at the first layer.

        Args:
            prompt: tokens or, with a tokenizer, text.

        Raises:
            ValueError: if the prompt is empty, or too long for the model.
            RuntimeError: before `fit_router`.
        """
        return recall(self, self.read(prompt))

    # --- protocol ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raises TypeError: facts are added by `memorise`."""
        raise TypeError(f"grow({name!r}): facts are added by model.mome.memorise(facts)")

    def require_consistent(self) -> None:
        """Raises ValueError if router, keys and facts do not fit each other."""
        text: Any = self._model.config.get_text_config()
        if self.looks_up_by_tokens:
            self.router.require_consistent(text.hidden_size)
        for lookup in self.lookups:
            lookup.require_consistent(self.log.edits)
        for use in self.uses:
            use.require_consistent()
