"""Finds the linear layers of a model that can mix adapters, and why others cannot."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import require_supported_hooks
from sapt_fast.pools.own import is_inside, own_paths
from sapt_fast.pools.sharding import is_sharded
from sapt_fast.sites.linear import Mixed, MixedOther, mixed_kind, packed_weight, runs_its_class
from sapt_fast.sites.modules import find_modules
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import tower_notes

# Model types in which all layers have [tokens, batch]. In Longformer only some have, and a forward
# raises an error.
_SEQUENCE_FIRST = ("fsmt", "xlnet")
# Children whose weights torch reads without calling them.
_READ_BY_TORCH: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)
# Attributes of a weight that are read without multiplying by it.
_PROPERTIES = ("device", "dtype", "ndim", "requires_grad", "shape", "size", "data")
# Default layers of vision transformers, for which PEFT has none.
_OF_IMAGES = dict.fromkeys(
    ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model",
     "siglip", "siglip_vision_model"),
    ("q_proj", "v_proj"),
)  # fmt: skip
_HEADS = ("score", "classifier")  # of models without output embeddings
# A child, and the attributes of its parent that must be true for its weight to be read.
Reading = tuple[str, tuple[str, ...]]
Readings = tuple[Reading, ...]
_FAKE_LIMITS = (
    DataDependentOutputException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class Chosen(Protocol):
    """The fields of a method's config that determine which layers it adapts."""

    target_modules: Sequence[str] | str | None
    modules_to_save: Sequence[str] | None


def find_layers(model: PreTrainedModel, config: Chosen) -> PatchReport:
    """Returns what `patch` would patch and skip; changes nothing.

    Args:
        model: the model.
        config: names the layers.

    Raises:
        ValueError: if the model type, its placement or the names are not supported.
    """
    require_placement(model)
    kind = model.config.model_type
    if kind in _SEQUENCE_FIRST:
        raise ValueError(
            f"model: the layers of {kind!r} models expect [tokens, batch]; per-sample weights "
            "could reach the wrong samples, so they are not supported"
        )
    report, targets, own = PatchReport(), chosen_names(model, config), own_paths(model)
    bypassed: dict[str, None] = {}
    for name, module in model.named_modules():
        if not _matches(name, targets) or is_inside(name, own):
            continue
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        reason = _unpatchable(module, parent, last)
        if reason is not None:
            report.skipped[name] = reason
            continue
        report.patched.append(name)
        if reader := bypass(parent, last):
            bypassed[f"{reader}.{last}"] = None
    if not isinstance(targets, str):
        if not isinstance(targets, frozenset):
            found = [*report.patched, *report.skipped]
            report.unmatched = [t for t in targets if not any(_matches(n, [t]) for n in found)]
        report.notes += tower_notes(model, report.patched)
    if bypassed:
        report.notes.append(
            "target_modules: in some cases the model reads the weights of "
            f"{', '.join(bypassed)} without calling these layers; their adapters then have no "
            "effect"
        )
    return report


def layers_to_patch(model: PreTrainedModel, config: Chosen) -> PatchReport:
    """Returns `find_layers`; raises ValueError if no layer can be patched."""
    report = find_layers(model, config)
    if not report.patched:
        raise ValueError(
            f"target_modules: {chosen_names(model, config)!r} selects no layer to patch in "
            f"{type(model).__name__}. {report}. Its linear layers are named: "
            f"{linear_names(model)}"
        )
    return report


def chosen_names(model: PreTrainedModel, config: Chosen) -> Iterable[str] | str:
    """Returns the names or regular expression of a config; for "all-linear", a frozenset of paths.

    Raises:
        ValueError: if the config names no layers and the model type has no default.
    """
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if [name.lower() for name in names] == ["all-linear"]:
        saved = find_modules(model, config.modules_to_save or (), ())
        inside = tuple(f"{path}." for path in saved)
        return frozenset(n for n in all_linear(model) if not f"{n}.".startswith(inside))
    if targets is not None:
        return targets
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as of_peft

    defaults = {**_OF_IMAGES, **of_peft}
    kind = model.config.model_type
    if kind not in defaults:
        raise ValueError(
            f"target_modules: no default for model type {kind!r}; name the linear layers to adapt "
            f"(this model has: {linear_names(model)})"
        )
    return defaults[kind]


def _matches(name: str, targets: Iterable[str] | str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(
                f"target_modules: got {targets!r}, expected a regular expression: {error}"
            ) from None
    if isinstance(targets, frozenset):
        return name in targets
    return any(name == target or name.endswith("." + target) for target in targets)


def _unpatchable(module: nn.Module, parent: nn.Module, name: str) -> str | None:
    reason = obstacle(module, parent, name)
    if reason is None and not runs_its_class(module):
        return "its forward was replaced by another library"
    return reason


def require_placement(model: PreTrainedModel) -> None:
    require_supported_hooks(model)
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"model: {lazy} is not initialised; run the model once before sapt_fast.patch"
        )
    if is_sharded(model):
        raise ValueError(
            "model: not possible, because its parameters are sharded (fully_shard or ZeRO-3); "
            "patch, load and add tasks before sharding. To remove the adapters, save them with "
            "model.sapt.save_pretrained and create the model again"
        )


def layer_features(module: Any) -> tuple[int, int]:
    """Returns (in_features, out_features) of a linear layer or a GPT-2 Conv1D."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer, including those that cannot mix."""
    return isinstance(module, (nn.Linear, Conv1D)) or packed_weight(module) is not None


def linear_names(model: nn.Module) -> list[str]:
    """Returns the last parts of the paths of a model's linear layers, sorted."""
    return sorted({path.rpartition(".")[2] for path, _ in _linear(model)})


def all_linear(model: PreTrainedModel) -> frozenset[str]:
    """Returns the paths of all linear layers but the output head, as PEFT's "all-linear".

    The head is the output embeddings, or else `score` or `classifier`.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        head = next((getattr(model, n) for n in _HEADS if hasattr(model, n)), None)
    return frozenset(path for path, module in _linear(model) if module is not head)


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the model itself: none that a method added."""
    own = own_paths(model)
    for path, module in model.named_modules():
        if is_linear(module) and not is_inside(path, own):
            yield path, module


def obstacle(module: Any, parent: nn.Module, name: str) -> str | None:
    """Returns why a module cannot mix adapters; None if it can.

    Args:
        module: the module.
        parent: its parent.
        name: its name in the parent.
    """
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, Mixed):
        return f"{kind} is patched already, by another method or as part of another model"
    if not is_linear(module):
        return f"{kind} is not a linear layer"
    if reader := _never_called_by(parent, name):
        return f"{reader} reads its weight without calling it, so adapters would have no effect"
    if packed_weight(module) is None and (reason := _of_weight(module)):
        return reason
    if issubclass(mixed_kind(module) or Mixed, MixedOther):
        return _of_output(module)
    return None


def _of_weight(module: Any) -> str | None:
    if is_parametrized(module):
        return "it is parametrised (torch.nn.utils.parametrize), which sets its class itself"
    weight = module.weight
    inputs, outputs = layer_features(module)
    expected = (inputs, outputs) if isinstance(module, Conv1D) else (outputs, inputs)
    shape = tuple(getattr(weight, "shape", ()))
    if shape != expected:
        return f"its weight has shape {shape}, expected {expected} for its in and out features"
    return None


def _of_output(module: Any) -> str | None:
    """Returns why another class's forward does not map [..., I] to [..., O], or None.

    Runs the forward on fake tensors, without computing.
    """
    packed = packed_weight(module)
    if packed is not None:
        return None  # its kernels do not support fake tensors
    weight: Tensor = module.weight
    inputs, outputs = layer_features(module)
    kind: Any = type(module)
    probe = kind.__new__(kind)
    vars(probe).update(vars(module))
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            y = kind.forward(probe, torch.empty(1, 2, inputs, dtype=weight.dtype).to(weight.device))
    except _FAKE_LIMITS:
        return None
    except RuntimeError as error:
        return f"{kind.__name__} does not support an input [1, 2, {inputs}]: {_first_line(error)}"
    except Exception:  # it may need more arguments, which its caller passes
        return None
    if not isinstance(y, Tensor):
        return f"{kind.__name__} returns {type(y).__name__}, expected one tensor [..., {outputs}]"
    if tuple(y.shape) != (1, 2, outputs):
        return (
            f"{kind.__name__} returns {list(y.shape)} for an input [1, 2, {inputs}], expected "
            f"[1, 2, {outputs}]"
        )
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def bypass(parent: nn.Module, name: str) -> str | None:
    """Returns the class that also reads a layer's weight without calling it; None if none does.

    The layer's adapters have no effect when its weight is read.

    Args:
        parent: the layer's parent.
        name: the layer's name in the parent.
    """
    for kind, reads, _ in _uses(parent):
        if any(child == name and all(getattr(parent, f, True) for f in on) for child, on in reads):
            return kind.__name__
    return None


def _never_called_by(parent: nn.Module, name: str) -> str | None:
    """Returns the class of a parent that reads its child's weight and never calls the child."""
    for kind, names in _READ_BY_TORCH:
        if isinstance(parent, kind) and name in names:
            return kind.__name__
    reader = bypass(parent, name)
    called = any(name in calls for *_, calls in _uses(parent))
    return None if called else reader


def _uses(parent: nn.Module) -> Iterator[tuple[type, Readings, frozenset[str]]]:
    for kind in type(parent).__mro__:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield kind, *_children_used(kind)


@cache
def _children_used(kind: type) -> tuple[Readings, frozenset[str]]:
    """Finds, in a class's source, the children whose `weight` it reads, and those that it calls.

    `f(x, self.child.weight)` counts as reading; `self.child.weight.dtype` does not, nor does code
    that no forward runs.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return (), frozenset()
    reads: dict[Reading, None] = {}
    calls = set()
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and not _sets_up(method.name):
            reads |= dict.fromkeys(_readings(method, ()))
            called = (node.func for node in ast.walk(method) if isinstance(node, ast.Call))
            calls |= {node.attr for node in called if _is_own(node)}
    return tuple(reads), frozenset(calls)


def _is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Returns whether an expression is `self.name`."""
    return isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"


def _sets_up(method: str) -> bool:
    return any(part in method for part in ("init", "reset", "tie", "load", "set_", "prune"))


def _readings(node: ast.AST, flags: tuple[str, ...]) -> list[Reading]:
    if isinstance(node, ast.Attribute) and node.attr in _PROPERTIES:
        return []
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr"):
        return []
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        child = node.value
        if _is_own(child) and isinstance(node.ctx, ast.Load):
            return [(child.attr, flags)]
    if isinstance(node, ast.If):
        inside = flags + _required(node.test)
        readings = [r for part in node.body for r in _readings(part, inside)]
        rest = [*node.orelse, node.test]
        return readings + [r for part in rest for r in _readings(part, flags)]
    return [r for part in ast.iter_child_nodes(node) for r in _readings(part, flags)]


def _required(test: ast.expr) -> tuple[str, ...]:
    """Returns the attributes of self, except `training`, that a condition `a and b` requires."""
    terms = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return tuple(term.attr for term in terms if _is_own(term) and term.attr != "training")
