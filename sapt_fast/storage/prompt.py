"""PEFT's prompt-tuning file format, with the same file names as its LoRA format."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_fast.pools.own import is_inside, own_paths
from sapt_fast.storage.adapter_config import require_prompt_config
from sapt_fast.storage.lora import LORA_FILES, read_task_tensors, require_shapes
from sapt_fast.storage.tensors import StoredFiles, write_tensors

_CONFIG_FILE, _WEIGHTS_FILE = LORA_FILES
_KEY = "prompt_embeddings"


def write_prompt(
    folder: Path, model: Any, prompt: Tensor, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a folder that `PeftModel.from_pretrained(base, folder)` loads as prompt tuning.

    Args:
        folder: the folder, which is created if it is missing.
        model: the patched model; adapter_config.json names its kind.
        prompt: [P, D].
        metadata: metadata for the header of the weights' file.
    """
    from peft import PromptTuningConfig

    encodes = model.config.is_encoder_decoder
    config = PromptTuningConfig(
        task_type=("SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM") if model.can_generate() else None,
        num_virtual_tokens=prompt.shape[0],
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,  # only the encoder's input
        base_model_name_or_path=model.name_or_path or None,
        inference_mode=True,
    )
    folder.mkdir(exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)
    (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    write_tensors(folder / _WEIGHTS_FILE, {_KEY: prompt}, metadata)


def read_prompt(files: StoredFiles, task: str, length: int, width: int) -> Tensor:
    """Reads a prompt [length, width], as `write_prompt` wrote it.

    Args:
        files: contains the two files of the task.
        task: the task's name, which is also that of its folder.
        length: P, the expected number of rows.
        width: D, the expected width.

    Raises:
        ValueError: if the file is damaged, or contains something else.
    """
    tensors = read_task_tensors(files, task)
    require_shapes(files.folder / task / _WEIGHTS_FILE, tensors, {_KEY: (length, width)})
    return tensors[_KEY]


def outer_layers(model: PreTrainedModel) -> list[str]:
    """Returns the paths of a base model's first and last linear layer."""
    own = own_paths(model)
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not is_inside(name, own)
    ]
    return list(dict.fromkeys((paths[0], paths[-1])))


class PromptFiles:
    """The file format of tasks with prompts [P, D]."""

    fields: frozenset[str] = frozenset()

    def described(self, adapter: Tensor) -> dict[str, Any]:
        """Returns the fields of a task in sapt_config.json besides its name: none."""
        return {}

    def write(
        self,
        folder: Path,
        model: Any,
        adapter: Tensor,
        config: Any,
        mark: Mapping[str, str],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Writes a task's folder; PEFT's prompt tuning stores only the prompt."""
        write_prompt(folder, model, adapter, mark)

    def read(
        self,
        files: StoredFiles,
        task: Mapping[str, Any],
        layers: Mapping[str, tuple[int, int]],
        config: Any,
        width: int,
        beside: Mapping[str, tuple[int, ...]],
    ) -> Tensor:
        """Reads the prompt of a task."""
        return read_prompt(files, task["name"], config.prompt_length, width)

    def parts(
        self,
        adapter: Tensor,
        layers: Mapping[str, tuple[int, int]],
        config: Any,
        width: int,
        source: str,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Returns the tensors of an adapter by name, and the shapes that they must have."""
        return {"prompt": adapter}, {"prompt": (config.prompt_length, width)}

    def require_same_in_peft(
        self,
        files: StoredFiles,
        name: str,
        adapter: Tensor,
        model: Any,
        config: Any,
        beside: Collection[str],
        sealed: bool,
    ) -> None:
        """Raises ValueError if PEFT would compute something else from a task's folder."""
        length, width = adapter.shape
        require_prompt_config(
            files.folder / name / _CONFIG_FILE,
            files.json(f"{name}/{_CONFIG_FILE}"),
            length,
            width,
            sealed=sealed,
        )
