"""torch.compile in vLLM: a norm, or SiLU, and the layer after it become one op, whose kernel also quantizes the layer's input.

vLLM compiles a model in pieces and keeps norms as ops of its own (`vllm_ir`) until its passes are done. Here is one more
pass, which runs after those of vLLM's and before the one that cleans up and those that give the remaining norms their code.
"""

from __future__ import annotations

import inspect
import logging
import operator
import sys
from collections import Counter
from functools import cache
from typing import Any

import torch
import torch._inductor.pattern_matcher as pm
import vllm.ir.ops  # noqa: F401 defines torch.ops.vllm_ir
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode, get_pass_context
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from nvfp4_kernels.devices import hopper_problem

logger = logging.getLogger("nvfp4_plugin")

Node = Any
"""A `fx.Node`. To a type checker its arguments, which are nodes here, would be any constant as well."""

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


def install(config: VllmConfig) -> bool:
    """Let vLLM run the pass on what it compiles for `config`; False where it compiles nothing.

    Called while the model is built: only then does vLLM copy its compiler's options, and it hashes them, the passes among
    them, for its cache of compiled graphs. A pass that the user gave stays, and comes first.
    """
    compilation = config.compilation_config
    if compilation.mode != CompilationMode.VLLM_COMPILE or compilation.backend != "inductor":
        return False
    passes, key = compilation.inductor_compile_config, current_platform.pass_key
    if not isinstance(passes.get(key), FusionPass):
        passes[key] = FusionPass(passes.get(key))
        logger.info("nvfp4: torch.compile joins norms, and SiLU, to the layers that alone read them")
    return True


class FusionPass(InductorPass):
    """Turns `nvfp4.linear` of a norm or of SiLU, which nothing else reads, into one op. `first`: a pass to run before."""

    def __init__(self, first: InductorPass | None = None) -> None:
        self._first = first

    def __call__(self, graph: fx.Graph) -> None:
        if self._first is not None and self._first.is_applicable_for_range(get_pass_context().compile_range):
            self._first(graph)
        layers = graph.find_nodes(op="call_function", target=torch.ops.nvfp4.linear.default)
        fused = Counter(name for name in map(_fuse, layers) if name)
        if layers:
            parts = ", ".join(f"{count} {name}" for name, count in sorted(fused.items()))
            logger.info("nvfp4: a graph of %d layers, %d with what comes before them: %s", len(layers), fused.total(), parts)

    def uuid(self) -> str:
        first = None if self._first is None else str(self._first.uuid())
        return self.hash_dict({"source": inspect.getsource(sys.modules[__name__]), "first": first})


def _fuse(layer: Node) -> str | None:
    """Put one node in the place of `layer` and of what makes its input; the name of its op, None where they stay.

    What has become unused, and nodes that come after their users, are for vLLM's own clean-up, which follows.
    """
    (x, data, *_), rest = layer.args, layer.args[1:]
    x = _through_views(x)
    half = _value(data).shape[1]
    if len(x.users) > 1 or hopper_problem(2 * half):
        return None
    nvfp4, ir = torch.ops.nvfp4, torch.ops.vllm_ir
    if (gate_up := _gate_up(x)) is not None:
        return _replace(layer, nvfp4.silu_and_mul_linear.default, gate_up, *rest)
    if x.target == ir.rms_norm.default and _is_plain(x, 1):
        return _replace(layer, nvfp4.rms_norm_linear.default, *x.args[:3], *rest)
    if _is_item(x, 0) and x.args[0].target == ir.fused_add_rms_norm.default and _is_plain(x.args[0], 2):
        return _replace(layer, nvfp4.add_rms_norm_linear.default, *x.args[0].args[:4], *rest, pair=x.args[0])
    return None


def _value(node: Any) -> torch.Tensor:
    """A fake tensor of the node's shape and dtype."""
    return node.meta["val"]


def _is_item(node: Node, index: int) -> bool:
    return node.target is operator.getitem and node.args[1] == index


def _through_views(x: Any) -> Any:
    """What x [M, K] is a view of, if that is [M, K] too. vLLM takes such views out, unless it is told not to."""
    while x.target in _VIEWS and len(x.users) == 1 and _value(x.args[0]).dim() == 2:
        if _value(x.args[0]).shape[1] != _value(x).shape[1]:
            break
        x = x.args[0]
    return x


def _is_plain(norm: Node, weight: int) -> bool:
    """Whether a norm is over all of [M, K], its argument number `weight` of x's dtype.

    Gemma's weight is another tensor plus 1, in fp32, which would still take a kernel of its own.
    """
    x = _value(norm.args[0])
    if not isinstance(norm.args[weight], fx.Node) or _value(norm.args[weight]).dtype != x.dtype:
        return False
    return x.dim() == 2 and all(size is None for size in norm.args[weight + 2 :])


def _gate_up(x: Node) -> Node | None:
    """The [M, 2K] that x = silu(gate) * up is made of: by vLLM's own kernel, or by `SiluAndMul.forward_native`, decomposed."""
    if _is_item(x, 1) and x.args[0].target is auto_functionalized:
        function, made = x.args[0].args[0], x.args[0].kwargs
        return made["input"] if str(function) == "_C.silu_and_mul.default" else None
    value = _value(x)
    match = _silu_times(value.dtype, value.device).match(x)
    if not isinstance(match, pm.Match):
        return None
    gate, up = match.kwargs["gate"], match.kwargs["up"]
    if not gate.target == up.target == torch.ops.aten.slice.Tensor or gate.args[0] is not up.args[0]:
        return None
    k, both = value.shape[1], gate.args[0]
    halves = [(dim, start, min(end, 2 * k)) for _, dim, start, end in (gate.args, up.args)]
    return both if _value(both).dim() == 2 and _value(both).shape[1] == 2 * k and halves == [(1, 0, k), (1, k, 2 * k)] else None


@cache
@enable_fake_mode
def _silu_times(dtype: torch.dtype, device: torch.device) -> pm.PatternExpr:
    """The pattern of silu(gate) * up, as this version of torch decomposes it."""

    def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    example = [torch.empty(4, 8, dtype=dtype, device=device) for _ in range(2)]
    return pm.gen_pattern(silu_times, example, pm.fwd_only)


def _replace(layer: Node, op: Any, *args: Any, pair: Node | None = None) -> str:
    """Put op(*args) in the place of `layer`; of the second result of `pair` as well, if that is given."""
    graph = layer.graph
    with graph.inserting_before(layer):
        new = graph.call_function(op, args)
        if pair is None:
            new.meta["val"] = _value(layer)
            layer.replace_all_uses_with(new)
        else:
            new.meta["val"] = (_value(layer), pair.meta["val"][1])
            for index, old in (0, [layer]), (1, [user for user in pair.users if _is_item(user, 1)]):
                item = graph.call_function(operator.getitem, (new, index))
                item.meta["val"] = new.meta["val"][index]
                for node in old:
                    node.replace_all_uses_with(item)
    graph.erase_node(layer)
    return op.name().removeprefix("nvfp4::")
