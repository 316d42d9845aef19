"""One Hugging Face model in transformer_lens' bridge: its sites, and passes that stop where nothing more is needed.

The bridge's hook points name the sites; nothing is folded or centred, so values are Hugging Face's own. The bridge
recomputes attention and norms step by step so that every score can be hooked. None of our sites needs that, so those
two are handed back to the model's own modules (`_hand_back`): the numbers are then Hugging Face's, with its default
attention, and so is the speed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import AttentionBridge, NormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.activations import NewGELUActivation

from cache.errors import SaeError

_HOOKS = {  # site -> the bridge's name, inside `blocks.<layer>.`
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
_FINAL = "unembed.hook_in"

Hook = Callable[[Tensor], Tensor | None]


def hook_name(layer: int, site: str) -> str:
    """What transformer_lens calls a site of a layer."""
    return f"blocks.{layer}.{_HOOKS[site]}"


class Hooked(NamedTuple):
    """A hook point and what to call with each value that passes it; what is returned, if anything, replaces it."""

    at: nn.Module
    call: Hook


class Bridge:
    """A causal model, frozen, with hook points. Token ids are int64 [B, T] on its device; nothing tracks gradients."""

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        """Wrap a Hugging Face model, which is changed in place."""
        self.device = device
        self.n_vocab = int(model.get_input_embeddings().num_embeddings)
        self.dtype: torch.dtype = model.dtype
        attention = model.config._attn_implementation
        kind = type(model).__name__
        model.requires_grad_(False).eval().to(device)
        try:
            # no tokenizer: the stages speak token ids, and a folder without one would boot with an empty one
            bridge: Any = build_bridge_from_module(model, kind, hf_config=model.config, tokenizer=None, model_name=name)
        except ValueError as error:
            raise SaeError(
                f"--model {name}: transformer_lens has no bridge for {kind}; give one such as gpt2"
            ) from error
        if not getattr(bridge, "blocks", None) or not bridge.adapter.supports_causal_loss:
            raise SaeError(f"--model {name}: {kind} is not a causal transformer; give one such as gpt2")
        model.set_attn_implementation(attention)  # wrapping may have switched it to eager
        _hand_back(model)
        self._bridge = bridge
        self._points: dict[str, nn.Module] = bridge.hook_dict
        self.n_layers = len(bridge.blocks)
        self.context_length = int(bridge.cfg.n_ctx)
        self._widths: dict[int, dict[str, int]] = {}

    def point(self, layer: int, site: str) -> nn.Module:
        """The hook point of a site that `sites` lists."""
        return self._points[hook_name(layer, site)]

    def sites(self, layer: int) -> dict[str, int]:
        """Sites of a layer and their widths, from what arrives in a short pass: some hook points never fire."""
        if layer not in self._widths:
            names = {site: f"blocks.{layer}.{hook}" for site, hook in _HOOKS.items()}
            found = self.capture(self._zeros(1, 2), {s: self._points[n] for s, n in names.items() if n in self._points})
            self._widths[layer] = {site: value.shape[-1] for site, value in found.items() if value.shape[:-1] == (1, 2)}
        return self._widths[layer]

    @torch.no_grad()
    def capture(self, ids: Tensor, wanted: Mapping[Any, nn.Module], hooks: Sequence[Hooked] = ()) -> dict[Any, Tensor]:
        """What passes each wanted hook point, run no further than the last of them. Absent: what never fired."""
        found: dict[Any, Tensor] = {}

        def keeper(key: Any) -> Hook:
            def keep(value: Tensor) -> None:
                found[key] = value
                if len(found) == len(wanted):
                    raise _Stop

            return keep

        with _hooked([*hooks, *(Hooked(at, keeper(key)) for key, at in wanted.items())]), suppress(_Stop):
            self._run(ids)
        return {key: found[key] for key in wanted if key in found}

    def final(self, ids: Tensor, hooks: Sequence[Hooked] = ()) -> Tensor:
        """What the unembedding reads, [B, T, d_model]."""
        return self.capture(ids, {_FINAL: self._points[_FINAL]}, hooks)[_FINAL]

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """float32 [n, n_vocab] for rows [n, d_model] of `final`.

        By the whole model with its blocks skipped, so that whatever it does to logits (scaling, capping) is done.
        """
        put = Hooked(self._points[_FINAL], lambda _: final[:, None])
        with self.blocks_skipped(self.n_layers), _hooked([put]):
            return self._run(self._zeros(len(final), 1)).logits[:, 0].float()

    @contextmanager
    def blocks_skipped(self, until: int) -> Iterator[None]:
        """Blocks before `until` pass their input on (where blocks return more than a tensor, they all run instead)."""
        blocks = list(self._bridge.blocks)[:until] if self._blocks_return_tensors else []
        for block in blocks:
            object.__setattr__(block, "forward", _pass_on)  # a plain setattr reaches through to the wrapped module
        try:
            yield
        finally:
            for block in blocks:
                object.__delattr__(block, "forward")

    def _run(self, ids: Tensor) -> Any:
        return self._bridge.original_model(input_ids=ids, use_cache=False)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long, device=self.device)

    @cached_property
    def _blocks_return_tensors(self) -> bool:
        seen: list[bool] = []
        with ExitStack() as stack, torch.no_grad():
            for block in self._bridge.blocks:
                handle = block.register_forward_hook(
                    lambda _block, _args, value: seen.append(isinstance(value, Tensor))
                )
                stack.callback(handle.remove)
            self._run(self._zeros(1, 2))
        return all(seen)


class _Stop(Exception):
    """Everything asked for has been computed."""


@contextmanager
def _hooked(hooks: Iterable[Hooked]) -> Iterator[None]:
    """Plain torch hooks on the bridge's hook points: `HookPoint.add_hook` would reshape `attn_z` there and back."""
    with ExitStack() as stack:
        for at, call in hooks:
            handle = at.register_forward_hook(lambda _module, _args, value, call=call: call(value))
            stack.callback(handle.remove)
        yield


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    """A block that does nothing."""
    return args[0] if args else kwargs["hidden_states"]


def _hand_back(model: nn.Module) -> None:
    """Let attention, norms and the tanh GELU run as single kernels of the model's own again.

    The wrapped attention still calls the bridge's projections, so the hook points of all our sites fire as before.
    `gelu_new` in transformers is nine element-wise steps; torch does the same in one, equal but for rounding.
    """
    for module in list(model.modules()):
        # a component without a name wraps its parent, which must not run in its place
        if isinstance(module, (AttentionBridge, NormalizationBridge)) and module.name is not None:
            object.__setattr__(module, "forward", types.MethodType(GeneralizedComponent.forward, module))
        if isinstance(module, AttentionBridge) and module.name is not None:
            _hook_output_projection(module)
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _hook_output_projection(attention: Any) -> None:
    """See that the wrapped attention calls the bridge's output projection, whose input is attn_z.

    (A bridge that splits a joint query-key-value projection leaves the wrapped module's own in place.)
    """
    projection = attention.submodules.get("o")
    name = getattr(projection, "name", None) or ""
    if projection is not None and getattr(attention.original_component, name, None) is projection.original_component:
        setattr(attention.original_component, name, projection)
