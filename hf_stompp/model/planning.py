"""Finds what to binarize in a model: its layers in order of depth, and what reads which tensor."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..config import StoMPPConfig, matches
from ..nn.convolution import Geometry
from ..nn.module import tensor_version
from ..plan import EMBEDDING_KINDS, Plan, PlannedModule, sublayer_unit
from .example_inputs import example_inputs
from .stack import Stack, find_stack


logger = logging.getLogger(__name__)


def is_excluded(name: str, patterns: list[str]) -> bool:
    """Whether a module's name has whole dot-separated parts that match one of the regular expressions."""
    return any(matches(name, pattern) for pattern in patterns)


_Read: TypeAlias = tuple[Tensor, int | None]
"""A tensor that was read, and how often it had been written in place by then."""


class _Trace(TorchFunctionMode):
    """What one forward pass did with the linear layers of a stack, and with the tensors they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_calls: Counter[str] = Counter()
        # What each of them read first.
        self.reads: dict[str, _Read | None] = {}
        # Outputs of linear layers and of what may be activation functions. Keeping a tensor keeps its identity from
        # being reused.
        self.outputs: dict[str, list[Tensor]] = {}
        self.readers: dict[int, set[str]] = {}
        self.functions: set[str] = set()
        self.running: list[str] = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self.readers:
                self.readers[id(value)].add(self.running[-1])
        return func(*args, **(kwargs or {}))

    def only_read_by(self, name: str, readers: set[str]) -> bool:
        """Whether a module ran once, and its output was read, but by none except `readers`."""
        outputs = self.outputs.get(name, [])
        found = [self.readers[id(output)] for output in outputs]
        return len(found) == 1 and bool(found[0]) and found[0] <= readers

    def reads_channels_of(self, function: str, convolution: str) -> bool:
        """Whether an activation function read a map of as many channels as a convolution put out."""
        read = self.reads[function]
        return read is not None and read[0].dim() == 4 and read[0].shape[1] == self.outputs[convolution][0].shape[1]


@torch.no_grad()
def _trace(model: nn.Module, stack: Stack, inputs: Mapping[str, Any]) -> _Trace:
    trace, candidates = _Trace(), stack.binary_candidates()

    def on_layer(name: str, module: nn.Module, args: Any) -> None:
        trace.layer_calls[name] += 1

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.running.append(name)
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        trace.reads.setdefault(name, None if tensor is None else (tensor, tensor_version(tensor)))

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        trace.running.pop()
        if isinstance(output, Tensor):
            trace.outputs.setdefault(name, []).append(output)
            # From now on it is recorded who reads it.
            trace.readers.setdefault(id(output), set())

    with ExitStack() as hooks:
        for layer_name, layer in stack.layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(on_layer, layer_name)).remove)
            for name, module in layer.named_modules(prefix=layer_name):
                if _may_be_activation_function(module):
                    trace.functions.add(name)
                if name in trace.functions or name in candidates:
                    hooks.callback(module.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(partial(after, name)).remove)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with trace:
                model(**inputs)
        except Exception as error:
            shapes = {name: list(getattr(value, "shape", [])) for name, value in inputs.items()}
            raise ValueError(
                f"{type(model).__name__} fails on the example that shows which layers read the same tensor, {shapes}: "
                f"{type(error).__name__}: {error}. Pass one that it takes, a dict of its forward "
                "arguments: binarize(model, config, example_inputs={...}) or StoMPPConfig(example_inputs={...})"
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
    return trace


def _may_be_activation_function(module: nn.Module) -> bool:
    """A module without tensors or children that acts on each element alone, whatever its neighbours."""
    if (
        isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        or any(True for _ in module.children())
        or module.state_dict()
    ):
        return False
    probe = torch.linspace(-2.0, 2.0, 6)
    try:
        output = module(probe)
        alone = torch.stack([module(value.reshape(1)) for value in probe]).flatten()
    # A module that cannot take a vector is no activation function, whatever it raises.
    except Exception:
        return False
    return isinstance(output, Tensor) and output.shape == probe.shape and torch.allclose(output, alone, atol=1e-6)


def _sublayer_units(layer_name: str, linears: list[str]) -> dict[str, str]:
    """The first child of the layer that runs a linear layer is the attention, the rest the feed-forward."""
    children = {name: name[len(layer_name) + 1 :].split(".")[0] for name in linears}
    attention = children[linears[0]]
    rest = list(dict.fromkeys(child for child in children.values() if child != attention))
    return {
        name: sublayer_unit(layer_name, [attention] if child == attention else rest)
        for name, child in children.items()
    }


def plan_modules(model: nn.Module, config: StoMPPConfig, inputs: Mapping[str, Any] | None = None) -> Plan:
    """
    Plans what [`binarize`] replaces, by name, in order of depth.

    One forward pass in evaluation mode, with [`example_inputs`] where none are given, tells which linear layers read
    the same tensor (they share a binary activation: the first one's entry names itself as `input`, the others' name
    the first), and which read the output of an activation function (their entries name it, and it gets an entry of its
    own).

    Raises a `ValueError` for no stack, an ambiguous one, layers that are shared, a tied weight, `modes` that match
    nothing or contradict each other, or nothing left to binarize.
    """
    stack = find_stack(model, config.layer_stack)
    if stack.kind == "convolution" and config.unit == "sublayer":
        raise ValueError(
            f"StoMPPConfig.unit='sublayer' is for attention and feed-forward, and {type(model).__name__} has "
            "convolutions: choose 'layer' (a block) or 'module'"
        )
    if stack.kind == "linear" and config.activation_functions != "kept":
        raise ValueError(
            f"StoMPPConfig.activation_functions={config.activation_functions!r} is for blocks of convolutions, and "
            f"{type(model).__name__} has linear layers: leave it 'kept'"
        )
    trace = _trace(model, stack, example_inputs(model) if inputs is None else inputs)
    shared = [name for name, calls in trace.layer_calls.items() if calls > 1]
    if shared or len({id(layer) for layer in stack.layers.values()}) < len(stack.layers):
        raise ValueError(
            f"{type(model).__name__} shares its layers: {shared or [stack.name]} run more than once in a forward "
            "pass, so there is no depth for a progression to follow, and one weight would be frozen for several "
            "depths at once. Models with shared layers (ALBERT with num_hidden_layers > num_hidden_groups) are not "
            "supported: choose one such as BERT or RoBERTa"
        )
    _check_modes(stack, config)
    wanted = [
        name
        for name in stack.binary_candidates()
        if not is_excluded(name, config.modules_to_not_convert) and config.mode_of(name) != "float"
    ]
    _warn_of_idle_layers(stack, wanted, trace)
    plan: Plan = {}
    if config.word_embeddings != "float":
        plan.update(_plan_embedding(model, EMBEDDING_KINDS[config.word_embeddings]))
    for layer_name in stack.layers:
        plan.update(_plan_layer(layer_name, stack, wanted, config, trace, plan))
    if config.activation_functions == "sign" and not any(entry.kind == "sign" for entry in plan.values()):
        raise ValueError(
            f"StoMPPConfig.activation_functions='sign' finds no activation function to replace in "
            f"{type(model).__name__}: they stand behind convolutions of mode 'bnn', and modules_to_not_convert="
            f"{config.modules_to_not_convert} may keep them; leave it 'kept'"
        )
    if not any(entry.is_linear for entry in plan.values()):
        raise ValueError(
            f"nothing to binarize in {type(model).__name__}: every {stack.in_words} of {stack.name} is float by "
            f"modules_to_not_convert={config.modules_to_not_convert} or modes={config.modes}, or does not run on the "
            "example input"
        )
    check_not_tied(model, plan)
    return plan


def _check_modes(stack: Stack, config: StoMPPConfig) -> None:
    linears = list(stack.binary_candidates())
    for pattern, mode in (config.modes or {}).items():
        found = [name for name in linears if matches(name, pattern)]
        if not found:
            raise ValueError(
                f"StoMPPConfig.modes: {pattern!r} matches no {stack.in_words} of the encoder; their names are like "
                f"{linears[0]!r}"
            )
        kept = [name for name in found if is_excluded(name, config.modules_to_not_convert)]
        if kept and mode != "float":
            raise ValueError(
                f"StoMPPConfig.modes: {pattern!r} makes {kept[0]!r} {mode}, and modules_to_not_convert leaves it "
                "float; change one of them"
            )


def _warn_of_idle_layers(stack: Stack, wanted: Iterable[str], trace: _Trace) -> None:
    idle = [name for name in wanted if name not in trace.reads]
    if idle:
        logger.warning(
            "%d %ss stay float, because they do not run on the example input: %s%s. They need another "
            "(binarize(model, config, example_inputs={...})), or the model reads their weights without calling them.",
            len(idle),
            stack.in_words,
            ", ".join(idle[:3]),
            ", ..." if len(idle) > 3 else "",
        )


def _plan_embedding(model: nn.Module, kind: str) -> Plan:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or type(embedding) is not nn.Embedding:
        raise ValueError(
            f"word_embeddings: the input embeddings of {type(model).__name__} are {type(embedding).__name__}, "
            "not nn.Embedding; set word_embeddings='float'"
        )
    return {name: PlannedModule(name, kind, unit=name)}


def _plan_layer(
    layer_name: str, stack: Stack, wanted: Container[str], config: StoMPPConfig, trace: _Trace, before: Plan
) -> Plan:
    candidates = stack.within(layer_name)
    linears = {
        name: module
        for name, module in candidates.items()
        if name in wanted and not (stack.kind == "convolution" and _stays_float(name, candidates, config, trace))
    }
    # Execution order is depth order. What did not run has no place in it, and could not be packed: its input would
    # never have got a scale.
    names = [name for name in trace.reads if name in linears]
    if not names:
        return {}
    if config.unit == "layer":
        units = dict.fromkeys(names, layer_name)
    elif config.unit == "sublayer":
        units = _sublayer_units(layer_name, names)
    else:
        units = {name: name for name in names}
    if stack.kind == "convolution":
        return _plan_block(layer_name, linears, units, config, trace, before)
    plan: Plan = {}
    for name in names:
        source = None if config.mode_of(name) == "bwn" else _input_of(name, linears, plan, trace, config)
        if source is not None and source not in plan and source != name:
            plan[source] = PlannedModule(source, "activation", units[name], _producer_of(source, plan, trace))
        plan[name] = PlannedModule(name, stack.kind, units[name], source, linears[name].bias is not None)
    return plan


def _plan_block(
    block_name: str,
    convolutions: Mapping[str, nn.Module],
    units: Mapping[str, str],
    config: StoMPPConfig,
    trace: _Trace,
    before: Plan,
) -> Plan:
    """
    The binary convolutions of a block, each of which binarizes its own input where no sign has done it, and the
    activation functions that the sign replaces: behind a convolution of as many channels that reads bits itself.
    `before` is the plan of the blocks before this one.
    """
    plan: Plan = {}
    replaced = {
        name
        for name in trace.functions
        if config.activation_functions == "sign"
        and name.startswith(f"{block_name}.")
        and not is_excluded(name, config.modules_to_not_convert)
    }
    last: str | None = None
    for name, read in trace.reads.items():
        if name in units:
            last = name
            source = None if config.mode_of(name) == "bwn" else _sign_before(read, {**before, **plan}, trace) or name
            has_bias = convolutions[name].bias is not None
            plan[name] = PlannedModule(name, "convolution", units[name], source, has_bias)
        elif name in replaced and last is not None and plan[last].reads_bits and trace.reads_channels_of(name, last):
            plan[name] = PlannedModule(name, "sign", units[last], last)
    return plan


def _sign_before(read: _Read | None, plan: Plan, trace: _Trace) -> str | None:
    """The sign of the plan that has put out what a convolution reads."""
    signs = [name for name, entry in plan.items() if entry.kind == "sign"]
    return next((name for name in signs if read is not None and trace.outputs[name][0] is read[0]), None)


def _stays_float(name: str, candidates: Mapping[str, nn.Conv2d], config: StoMPPConfig, trace: _Trace) -> bool:
    """
    Whether a convolution that may be binary is left float all the same: one with groups, as its products are short, or
    the shortcut of a block (paper), unless `modes` ask for it. One that does not run has no place in the plan; one
    that bits cannot express raises a `ValueError`.
    """
    convolution, is_asked_for = candidates[name], any(matches(name, pattern) for pattern in config.modes or {})
    if trace.reads.get(name) is None:
        return True
    if (convolution.groups > 1 or _is_shortcut(name, candidates, trace)) and not is_asked_for:
        return True
    try:
        Geometry.of(convolution)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if config.mode_of(name) == "bnn" and convolution.in_channels % 8:
        raise ValueError(
            f"{name} has {convolution.in_channels} input channels; bits of them need a multiple of 8: make it bwn or "
            "float in StoMPPConfig(modes=...)"
        )
    return False


def _is_shortcut(name: str, candidates: Mapping[str, nn.Conv2d], trace: _Trace) -> bool:
    """
    Whether other convolutions of the block read the same tensor, and one of them is the main path: that with the
    largest filters, or of equally large ones the first.
    """
    mine: Any = trace.reads[name]
    together = [other for other, read in trace.reads.items() if other in candidates and _same(read, mine)]
    return max(together, key=lambda other: candidates[other].weight[0, 0].numel()) != name


def _input_of(name: str, linears: Mapping[str, Any], plan: Plan, trace: _Trace, config: StoMPPConfig) -> str:
    """What binarizes the input of a linear layer: an activation function, another linear layer's input, its own."""
    read = trace.reads.get(name)
    if read is None:
        return name
    for function in trace.functions:
        if is_excluded(function, config.modules_to_not_convert):
            continue
        outputs = trace.outputs.get(function, [])
        # Dropout would be one more reader, also where it passes its input on.
        if outputs and outputs[0] is read[0] and trace.only_read_by(function, set(linears)):
            return function
    for other, entry in plan.items():
        if entry.is_linear and entry.input == other and _same(trace.reads.get(other), read):
            return other
    return name


def _same(one: _Read | None, other: _Read) -> bool:
    """Whether two reads are of one tensor that nothing wrote to in between."""
    return one is not None and one[0] is other[0] and one[1] == other[1]


def _producer_of(function: str, plan: Plan, trace: _Trace) -> str | None:
    """The linear layer whose output an activation function reads, and nothing else does."""
    read = trace.reads.get(function)
    for name, entry in plan.items():
        outputs = trace.outputs.get(name, [])
        if entry.is_linear and outputs and read is not None and outputs[0] is read[0]:
            return name if trace.only_read_by(name, {function}) else None
    return None


def check_not_tied(model: nn.Module, plan: Plan) -> None:
    """Checks that no weight of the plan is that of another module as well; the `ValueError` names it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in plan.items():
        if entry.is_function:
            continue
        aliases = [other for other in names[id(parameters[f"{name}.weight"])] if other != f"{name}.weight"]
        if aliases:
            what = "set word_embeddings='float'" if entry.is_embedding else f"add {name!r} to modules_to_not_convert"
            raise ValueError(f"{name}.weight is tied to {aliases}; a tied weight is never binarized: {what}")
