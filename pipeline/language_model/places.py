"""Places in a model that somebody else made: hooks on a Hugging Face model or a transformer_lens bridge, left as it is.

A place is said as `6.mlp_out`, as transformer_lens calls it (`blocks.6.hook_mlp_out`), or as the name of a module,
whose output it is (`transformer.h.6.mlp`; with `.input` behind it, its input). Where a site is in a Hugging Face model
is found by trying: two of a block's parts are what is added to the stream if they, and no others, add up to what leaves
the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sae.cache.arguments import checked
from sae.cache.errors import SaeError
from sae.cache.points import hook_name, point_in, point_of_hook
from sae.pipeline.language_model.bridge import Hooked, hooked
from sae.pipeline.language_model.interventions import Change, changed
from sae.pipeline.language_model.model import LanguageModel
from sae.pipeline.language_model.promises import equal
from sae.pipeline.language_model.sites import Point

MLPS = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1")  # what the MLP, or its first part, is called
TRIED = 4  # tokens
_trying: ContextVar[bool] = ContextVar("trying", default=False)  # interventions that are open do nothing meanwhile
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[str, bool]]] = WeakKeyDictionary()  # what was found in a block


class Place(NamedTuple):
    """The input or the output of a module."""

    module: nn.Module
    is_input: bool


Said = Point | str


@checked
@contextmanager
def intervene(model: Any, changes: Mapping[Said, Change]) -> Iterator[None]:
    """Within this context the activations at each place go through the function given for it, whoever runs the model.

    `model`: a Hugging Face model, a transformer_lens bridge, or a `LanguageModel`. A function gets [B, T, width] (where
    a block works on all rows in one list, [B * T, width]) and returns what goes on in their place, or None where it
    only looks. Raises SaeError where there is no such place.
    """
    if isinstance(model, LanguageModel):
        with model.intervene({_point(said): change for said, change in changes.items()}):
            yield
        return
    known = getattr(model, "hook_dict", None)  # of a bridge
    contexts = []
    for said, change in changes.items():
        checked = partial(changed, change, point=said)
        contexts.append(_hooked(_found(model, said), checked) if known is None else _of_bridge(known, said, checked))
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _of_bridge(known: Mapping[str, nn.Module], said: Said, change: Change) -> AbstractContextManager[None]:
    """The context in which what passes a hook point of a bridge goes through a function."""
    point = _as_point(said)
    name = str(said) if point is None else hook_name(*point)
    if name not in known:
        raise SaeError(f"{said}: the bridge has no hook point {name}")
    in_place = name.endswith("resid_mid")  # the block keeps the tensor for its sum

    def put(value: Tensor) -> Tensor | None:
        rows = value.flatten(2) if value.ndim == 4 else value  # heads apart
        new = change(rows)
        if new is None:
            return None
        new = new.to(value.dtype).view(value.shape)
        return value.copy_(new) if in_place else new

    return hooked([Hooked(known[name], put)])


@contextmanager
def _hooked(place: Place, change: Change) -> Iterator[None]:
    """A plain module's input or output goes through a function."""

    def put(value: Tensor) -> Tensor:
        new = None if _trying.get() else change(value)
        return value if new is None else new.to(value.dtype)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (put(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])}

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        return (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)

    module = place.module
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if place.is_input
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def _found(model: nn.Module, said: Said) -> Place:
    """A place in a Hugging Face model. Raises SaeError, saying what there is, where it is not found."""
    point = _as_point(said)
    if point is None:
        path = str(said).removesuffix(".input")
        named = dict(model.named_modules())
        fits = [name for name in named if name == path] or [name for name in named if name.endswith(f".{path}")]
        if len(fits) != 1:
            what = f"is ambiguous; it may be {', '.join(fits)}" if fits else "is not a module of the model"
            raise SaeError(f"{said}: {what}; give a site as 6.mlp_out, or the name of a module")
        return Place(named[fits[0]], path != str(said))
    blocks = _blocks(model)
    if not 0 <= point.layer < len(blocks):
        raise SaeError(f"{said}: the model has layers 0 to {len(blocks) - 1}")
    block = blocks[point.layer]
    if block not in _known:
        _known[block] = _sites(model, block)
    sites = _known[block]
    if point.site not in sites:
        raise SaeError(
            f"{said}: not found in this {type(model).__name__}, of whose sites there are {', '.join(sites)}; give the "
            "name of a module"
        )
    path, is_input = sites[point.site]
    return Place(block.get_submodule(path), is_input)


def _blocks(model: Any) -> nn.ModuleList:
    """The layers of a Hugging Face model."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise SaeError(f"{type(model).__name__}: its layers are not found; give the name of a module")


class _Seen(NamedTuple):
    given: Tensor
    made: Tensor


def _sites(model: Any, block: nn.Module) -> dict[str, tuple[str, bool]]:
    """The sites of a block that are found: the path of a module in it, and whether the site is its input."""
    seen = _tried(model, block)
    parts = [name for name in seen if name and "." not in name]
    of_attention = [name for name in parts if "att" in name]
    added = [
        (a, m) for a in of_attention for m in parts
        if m not in of_attention and equal(seen[""].made, [seen[""].given, seen[a].made, seen[m].made])
    ][:1]  # fmt: skip
    sites = {"resid_pre": ("", True), "resid_post": ("", False)}
    for attention, mlp in added:
        sites |= {"attn_out": (attention, False), "mlp_out": (mlp, False)}
    mlps = [name for name in MLPS if name in parts][:1]
    if mlps:
        sites["mlp_in"] = mlps[0], True
    if mlps == ["fc1"]:  # a block's own, and so is what follows it
        mlps = [mlp for _, mlp in added]
    for site, names in (("attn_z", of_attention), ("mlp_post", mlps)):
        for path in (_projection(block, seen, name) for name in names):
            if path is not None:
                sites.setdefault(site, (path, True))
    return sites


def _projection(block: nn.Module, seen: Mapping[str, _Seen], name: str) -> str | None:
    """The path of the matrix whose product is what a part of a block gives."""
    for inner, module in block.get_submodule(name).named_modules():
        path = f"{name}.{inner}" if inner else name
        weight = getattr(module, "weight", None)
        if path in seen and weight is not None and weight.ndim == 2 and equal(seen[path].made, [seen[name].made]):
            return path
    return None


@torch.no_grad()
def _tried(model: Any, block: nn.Module) -> dict[str, _Seen]:
    """Return what enters and leaves a block ("") and each module in it, for a few tokens; each [1, T, ...]."""
    seen: dict[str, _Seen] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given, made = (args[0] if args else kwargs.get("hidden_states")), out[0] if isinstance(out, tuple) else out
            if _of_tokens(given) and _of_tokens(made):
                # copies: some models add to them in place
                seen[name] = _Seen(given.reshape(1, TRIED, -1).clone(), made.reshape(1, TRIED, -1).clone())

        return hook

    modes = {module: module.training for module in model.modules()}
    ids = torch.arange(TRIED, device=next(model.parameters()).device)[None]
    with ExitStack() as stack:
        for name, module in block.named_modules():
            stack.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
        model.eval()
        trying = _trying.set(True)
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            _trying.reset(trying)
            for module, mode in modes.items():
                module.training = mode
    return seen


def _of_tokens(value: Any) -> TypeGuard[Tensor]:
    """Return True if a value may be something of each of the tokens."""
    return isinstance(value, Tensor) and value.numel() > 0 and value.numel() % TRIED == 0


def _as_point(said: Said) -> Point | None:
    """The layer and site that text means, where it means one."""
    if isinstance(said, Point):
        return said
    where = point_of_hook(said) if said.startswith("blocks.") else point_in(said)
    return None if where is None else Point(*where)


def _point(said: Said) -> Point:
    if (point := _as_point(said)) is None:
        raise SaeError(f"{said}: is not a layer and site; write it as 6.mlp_out")
    return point
