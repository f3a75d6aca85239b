"""The protocol of a method, which patching, saving and training use.

A method consists of a config (a dataclass) and a handle (a module of the model,
`model.<attribute>`). The handle:

- names the places that the method changes, and attaches its pools to them;
- computes the mixture weights of a forward before the layers run, if the method has weights;
- adds tasks;
- returns the tensors and values that a saved folder must contain.

To add a method, write its config and handle in one file and add the handle to
`sapt_fast.methods.registry.METHODS`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from sapt_fast.checks import require_count
from sapt_fast.files.directories import read_directory
from sapt_fast.methods.config import MethodConfig
from sapt_fast.pools.own import Own
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.description import writes
from sapt_fast.storage.hub import upload
from sapt_fast.storage.method_files import StoredMethod, config_file, read_method, write_method
from sapt_fast.storage.model_card import CARD_FILE, card_of
from sapt_fast.storage.pretrained_files import PretrainedFiles
from sapt_fast.storage.tasks import require_same_config

__all__ = ["Handle", "follow", "handles", "require_held", "trainable_share"]


class Handle(Own, nn.Module):
    """The base class of the handles, `model.<attribute>`, by which users control a method.

    Args:
        model: the model to patch; only `attach` and `install` change it.
        config: the method's config.
        report: the return value of `sites`.

    Attributes:
        Config: the class of the config.
        method: the method's name in saved folders and messages.
        attribute: the handle's name on the model. Methods that share it exclude each other.
        site: the kind of place that the method changes. Two methods of one kind may not change
            the same place.
        freezes: whether the base model's parameters are frozen while the model is patched.
        grows: whether tasks are added after `patch`; if not, `patch` makes all there is, and
            loading replaces its values.
        unfrozen_before: names of the parameters that required a gradient before `patch`.
        routing: the weights of the running forward; None for a method without mixture weights.
    """

    Config: ClassVar[type[MethodConfig[Any]]]
    method: ClassVar[str]
    attribute: ClassVar[str]
    site: ClassVar[str]
    freezes: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    config: Any
    routing: Routing | None = None
    files: Any
    _model: Any

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: it is the model's
        self.config = config
        self._report = report
        self._tasks: list[str] = []
        self.unfrozen_before: list[str] = []
        self.files = PretrainedFiles(self)

    @property
    def report(self) -> PatchReport:
        """The layers that were patched, and those that were not, with the reasons."""
        return self._report

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks (edits, experts), oldest first."""
        return self._tasks

    # --- the protocol ---

    @classmethod
    def of_model(cls, model: Any) -> type[Handle]:
        """Returns the class of the handle for a model; methods with one class return it."""
        return cls

    @classmethod
    def settled(cls, model: Any, config: Any) -> Any:
        """Returns the config with the defaults that depend on the model."""
        return config

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the places that the method will change, and the reason for each skipped one.

        Changes nothing.

        Args:
            model: the model to patch.
            config: the method's config.

        Raises:
            ValueError: if the method cannot work on this model.
        """
        raise NotImplementedError

    def attach(self, path: str) -> None:
        """Adds the method's pool, codebook or bank to one of the places in `report.patched`."""
        raise NotImplementedError

    def detach(self, path: str) -> None:
        """Undoes `attach`."""
        raise NotImplementedError

    def signal(self, **inputs: Tensor | None) -> Tensor | None:
        """Computes the mixture weights of a forward, once for all layers.

        Args:
            **inputs: input_ids, inputs_embeds, attention_mask and labels of the forward.

        Returns:
            Weights [B, K]; None for methods without mixture weights.
        """
        return None

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds the next task, edit or expert; it trains, and the earlier ones freeze.

        Args:
            name: the name of the task, edit or expert.
            optimizer: in it, the new parameters replace those of the previous task, with fresh
                state.
        """
        raise NotImplementedError

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the content of a saved folder: named tensors, and values that JSON supports.

        Trained tensors of the base model are named `trained.<name>`.
        """
        raise NotImplementedError

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copies what `stored` returned into a handle without tasks.

        Args:
            tensors, values: the return values of `stored`.

        Raises:
            ValueError: if something is missing or has another shape; nothing has changed then.
        """
        raise NotImplementedError

    def restore_files(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Reads what a method has saved in further files, after `restore`; most have none.

        Args:
            folder: the saved folder.
            values: the values that were saved.
        """

    # --- what all methods have ---

    @property
    def slot(self) -> str:
        """The attribute name of the modules that `attach` adds to layers."""
        return f"sapt_{self.attribute}"

    @property
    def config_file(self) -> str:
        """The file of a saved folder that describes the method."""
        return config_file(self.attribute)

    def install(self) -> None:
        """Adds hooks; called by `patch` once everything is attached."""
        self.files.install()

    def remove(self) -> None:
        """Removes the hooks; called by `unpatch` before anything is detached."""
        self.files.remove()

    def places(self) -> list[str]:
        """Returns the paths for which `attach` was called and that still exist."""
        return self.report.patched

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced what `attach` added."""

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced a method that `install` put there."""
        if self.routing is not None:
            self.routing.require_removable()

    def leave(self) -> None:
        """Removes the method from the model: its hooks, pools and handle."""
        places = self.places()
        self.remove()
        for path in places:
            self.detach(path)
        delattr(self._model, self.attribute)

    def require_unmerged(self) -> None:
        """Raises RuntimeError if a mixture is merged into the base weights."""
        if self.routing is not None:
            self.routing.require_unmerged()

    def warmup(self, batches: Iterable[tuple[int, int]], *, train: bool = False) -> None:
        """Runs the method's kernels for batches of these sizes, before a time that counts.

        Afterwards, calls with these sizes compile no kernel and read no file. Call it before a
        CUDA graph is captured, during which neither is possible. The values of all inputs are 0.

        Nothing visible changes: random states, gradients, buffers and the weights of the last
        forward stay. Hooks on the model's layers and parameters are not called, except
        those of the input embedding, which the router reads. A method whose layers have no
        kernels of their own does nothing. The base model's own operations are not run.

        Args:
            batches: (B, T) of each batch: samples, and tokens of a sample. Include (B, 1) for
                generation, and for an encoder-decoder model the lengths on both sides.
            train: False: forwards without gradients. True: forwards and backwards. Call it inside
                autocast if the model will run there.

        Raises:
            ValueError: if a size is not a whole number of at least 1.
            RuntimeError: if there is no task yet, or a mixture is merged into the base weights.

        Example:
            >>> import sapt_fast
            >>> from sapt_fast.demo.backbone import load_backbone
            >>> model = sapt_fast.patch(load_backbone()).eval()
            >>> model.sapt.add_task("first")
            >>> model.sapt.warmup([(8, 64), (8, 1)])  # a prompt, then one token at a time
        """
        sizes = [*batches]
        for size in sizes:
            if not isinstance(size, tuple) or len(size) != 2:
                raise ValueError(f"batches: got {size!r}, expected pairs (samples, tokens)")
            for number in size:
                require_count("batches", number)
        self.require_unmerged()
        devices = {p.device for p in self._model.parameters() if p.is_cuda}
        apart = nullcontext() if self.routing is None else self.routing.apart()
        with torch.random.fork_rng([*devices]), apart, torch.set_grad_enabled(train):
            for samples, tokens in sizes:
                # The first call compiles, the second is recorded, the third takes the record.
                for _ in range(3):
                    self.run_layers(samples, tokens)

    def run_layers(self, samples: int, tokens: int) -> None:
        """Runs the method's layers once, for `warmup`; without kernels of its own, nothing.

        Where gradients are enabled, the backward runs too. It may not change any `.grad`.

        Args:
            samples, tokens: B and T of the inputs [B, T, in_features].
        """

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Returns the parameters that training updates.

        Of a method with tasks they are the newest adapter, its key, the query projection and
        `config.modules_to_save`.
        """
        return (p for p in self._model.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Prints how many of the model's numbers train, in PEFT's format."""
        print(trainable_share(self._model))

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, is_main_process: bool | None = None
    ) -> None:
        """Saves the method's tensors and settings into a folder, beside those of other methods.

        Args:
            directory: the folder. The files of an earlier call are replaced together; other files
                stay.
            is_main_process: whether this process writes. None: every process that calls writes;
                for a sharded model, all processes must call, and only rank 0 writes.

        Raises:
            ValueError: if the directory cannot be replaced or contains damaged files.
            FileExistsError: if a file with the name of a new one was not written by this method.
            OSError: if the directory cannot be written; its content is then unchanged.
        """
        self.save(directory, is_main_process=is_main_process)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves as `save_pretrained` does, with the values of a state_dict.

        Args:
            directory, is_main_process: as in `save_pretrained`.
            state: the model's state_dict, whose values are saved; None for the current values.
        """
        for one in handles(self._model):  # the base model is recognised by its weights
            one.require_unmerged()
        tensors, values = self.stored()
        write_method(self, directory, tensors, values, is_main_process)

    def _read(self, directory: str | os.PathLike[str]) -> StoredMethod:
        """Returns what a folder has stored of this method, with this config.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder contains another method, or one with another config.
        """
        read = partial(read_method, attribute=self.attribute)
        stored = read_directory(directory, self.config_file, read)
        require_same_config(self.config, stored.config, stored.source)
        if stored.method != self.method:
            raise ValueError(
                f"{stored.source}: method is {stored.method!r}, expected {self.method!r}"
            )
        return stored

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload with sapt_fast",
        create_pr: bool = False,
        is_main_process: bool | None = None,
    ) -> str | None:
        """Uploads what `save_pretrained` saves, with a model card, as one commit.

        `sapt_fast.load_pretrained(model, repo_id)` loads it. The base model is not uploaded.

        Args:
            repo_id: the repository on the Hugging Face Hub, `owner/name`; created if it is missing.
                Files that only an earlier upload has are deleted; files of others stay. A README.md
                that is not an unedited model card of sapt_fast stays.
            private: whether a new repository is private; None for the owner's default.
            token: None for the token of the login.
            revision: the branch; None for the main branch.
            commit_message: the subject of the commit.
            create_pr: whether to open a pull request instead of committing to the branch.
            is_main_process: whether this process uploads. None: every process that calls does; for
                a sharded model, all processes must call, and only rank 0 uploads.

        Returns:
            The address of the commit or of the pull request; None if this process does not upload.

        Raises:
            ValueError, RuntimeError: as `save_pretrained`; nothing is uploaded then.
            OSError: if the Hub refuses the upload.
        """
        writing = writes(self._model, is_main_process)
        with tempfile.TemporaryDirectory() as name:
            self.save_pretrained(Path(name, "saved"), is_main_process=is_main_process)
            if not writing:
                return None
            card = Path(name, "saved", CARD_FILE)
            card.write_text(card_of([self], repo_id), encoding="utf-8")
            return upload(
                card.parent,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the model's tasks to the values in a saved folder.

        Raises:
            RuntimeError: if the method cannot be restored this way.
        """
        raise RuntimeError(
            f"{directory}: contains {self.method} together with the model, which cannot be loaded "
            "into a patched model; load both with from_pretrained and sapt_fast.load_pretrained"
        )


def trainable_share(model: nn.Module) -> str:
    """Returns how many of a model's numbers train, as PEFT prints it."""
    # PEFT's own count, which knows the parameters of ZeRO-3 and of 4-bit layers.
    trainable, total = PeftModel.get_nb_trainable_parameters(model)  # type: ignore[arg-type]
    share = 100 * trainable / max(total, 1)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def handles(model: nn.Module) -> list[Handle]:
    """Returns the handles of a model, in the order in which its methods were patched."""
    return [child for child in model.children() if isinstance(child, Handle)]


def require_held(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raises ValueError unless an optimizer contains one of these parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
        raise ValueError(
            "optimizer: contains none of the previous task's parameters; pass the optimizer that "
            "trained them"
        )


def follow(
    optimizer: torch.optim.Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]
) -> None:
    """Replaces parameters of an optimizer by their successors, with fresh state.

    Args:
        optimizer: contains some or all of `before`.
        before: the parameters to replace.
        after: their successors, in the same order; further ones are added to the first group.
    """
    successor = {id(old): new for old, new in zip(before, after, strict=False)}
    for group in optimizer.param_groups:
        for old in group["params"]:
            if id(old) in successor:
                optimizer.state.pop(old, None)
        group["params"] = [successor.pop(id(p), p) for p in group["params"]]
    # The first task's copies of modules have no predecessors.
    optimizer.param_groups[0]["params"] += after[len(before) :]
