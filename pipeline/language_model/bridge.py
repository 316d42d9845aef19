"""One Hugging Face model in transformer_lens' bridge: its sites, and passes that stop where nothing more is needed.

The bridge's hook points name the sites; nothing is folded or centred, so values are Hugging Face's own. Neither the
bridge nor its names are taken on trust: the wrapped model must give the plain one's logits, and a site is offered when
it has been seen to keep its promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle

from sae.cache.errors import SaeError
from sae.cache.points import HOOKS, hook_name
from sae.pipeline.language_model import promises
from sae.pipeline.language_model.files import one_line
from sae.pipeline.language_model.matrices import Matrix, Product, matrices_of, multiplying
from sae.pipeline.language_model.promises import ATTENTION, MLP, NEXT
from sae.pipeline.language_model.wrapping import wrap

_MODULES = {ATTENTION: "attn.hook_out", MLP: "mlp.hook_out"}  # likewise, what the modules themselves give
_FINAL = "unembed.hook_in"
_CHECKED = 4  # tokens that a model is tried out on

Hook = Callable[[Tensor], Tensor | None]


class Hooked(NamedTuple):
    """A hook point and what to call with each value that passes it; what is returned, if anything, replaces it."""

    at: nn.Module
    call: Hook


class Bridge:
    """A causal model, frozen, with hook points. Token ids are int64 [B, T] on its device; nothing tracks gradients."""

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        """Wrap a Hugging Face model, which is changed in place."""
        self.name = name
        self.device = device
        self.n_vocab = int(model.get_input_embeddings().num_embeddings)
        self.dtype: torch.dtype = model.dtype
        model.requires_grad_(False).eval().to(device)
        plain = self._tried(model)
        self._bridge: Any = wrap(model, name)
        self._points: dict[str, nn.Module] = self._bridge.hook_dict
        self.n_layers = len(self._bridge.blocks)
        self.context_length = int(self._bridge.cfg.n_ctx)
        self._widths: dict[int, dict[str, int]] = {}
        self._check_whole(plain)

    def point(self, layer: int, site: str) -> nn.Module:
        """The hook point of a site that `sites` lists."""
        return self._points[hook_name(layer, site)]

    def sites(self, layer: int) -> dict[str, int]:
        """Sites of a layer and their widths: those that are there and hold what they promise (see `promises`)."""
        if layer not in self._widths:
            last = layer + 1 == self.n_layers
            names = {what: f"blocks.{layer}.{hook}" for what, hook in (HOOKS | _MODULES).items()}
            names[NEXT] = _FINAL if last else hook_name(layer + 1, "resid_pre")
            points = {what: self._points[name] for what, name in names.items() if name in self._points}
            ids = self._some_ids()[:1]
            there = self.capture(ids, points)
            if MLP not in there and "mlp_out" in there:  # an MLP without a module of its own
                points[MLP] = points["mlp_out"]
            points = {what: at for what, at in points.items() if what in there or what == MLP}

            def trial(written: Mapping[str, Tensor]) -> dict[str, Tensor]:
                hooks = [self.replacing(layer, site, partial(_instead, value)) for site, value in written.items()]
                with self.blocks_skipped(layer):
                    return self.capture(ids, points, hooks)

            try:
                found = promises.kept(trial, last=last)
            except promises.NotFinite:
                raise SaeError(
                    f"model = {self.name}: layer {layer} gives infinities or NaN; its weights are damaged"
                ) from None
            self._widths[layer] = {site: there[site].shape[-1] for site in HOOKS if site in found}
        return self._widths[layer]

    def replacing(self, layer: int, site: str, change: Hook) -> Hooked:
        """A hook that puts `change(value)` [B, T, width], if anything, in the place of the value at a site."""

        def put(value: Tensor) -> Tensor | None:
            new = change(value)
            if new is None:
                return None
            new = new.to(value.dtype)
            # The hook point of resid_mid is the second norm's input. The block keeps the same tensor to add the MLP's
            # output to, so it is written in place: a returned one would leave the residual stream as it was.
            return value.copy_(new) if site == "resid_mid" else new

        return Hooked(self.point(layer, site), put)

    @torch.no_grad()
    def capture(self, ids: Tensor, wanted: Mapping[Any, nn.Module], hooks: Sequence[Hooked] = ()) -> dict[Any, Tensor]:
        """Return the values at each wanted hook point; nothing runs beyond the last. Absent: what never fired."""
        return self._seen(ids, wanted, hooks)

    def at(self, site: str, layer: int, given: tuple[str, Tensor]) -> Tensor:
        """Return what stands at a site, [n, width], where rows [n, width] are given at an earlier one of the layer.

        Each row is a context of one token by itself; what comes back has a graph to the rows.
        """
        earlier, rows = given
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
        put = self.replacing(layer, earlier, lambda _: rows[:, None])
        with self.blocks_skipped(layer), torch.enable_grad():
            return self._seen(ids, {site: self.point(layer, site)}, [put])[site].view(len(rows), -1)

    def _seen(self, ids: Tensor, wanted: Mapping[Any, nn.Module], hooks: Sequence[Hooked]) -> dict[Any, Tensor]:
        found: dict[Any, Tensor] = {}

        def keeper(key: Any) -> Hook:
            def keep(value: Tensor) -> None:
                found[key] = value
                if len(found) == len(wanted):
                    raise _Stop

            return keep

        keepers = [Hooked(at, keeper(key)) for key, at in wanted.items()]
        with hooked([*hooks, *keepers], ids.shape), suppress(_Stop):
            self._run(ids)
        return {key: found[key] for key in wanted if key in found}

    def final(self, ids: Tensor, hooks: Sequence[Hooked] = ()) -> Tensor:
        """Return the input of the unembedding, [B, T, d_model]."""
        return self.capture(ids, {_FINAL: self._points[_FINAL]}, hooks)[_FINAL]

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """float32 [n, n_vocab] for rows [n, d_model] of `final`.

        By the whole model with its blocks skipped, so that whatever it does to logits (scaling, capping) is done.
        """
        put = Hooked(self._points[_FINAL], lambda _: final[:, None])
        ids = torch.zeros(len(final), 1, dtype=torch.long, device=self.device)
        with self.blocks_skipped(self.n_layers), hooked([put], ids.shape):
            return self._run(ids).logits[:, 0].float()

    @torch.no_grad()
    def continued(self, ids: Tensor, before: Any, hooks: Sequence[Hooked] = ()) -> tuple[Tensor, Any]:
        """Logits float32 [B, n_vocab] after the last token, and the keys and values of all tokens so far.

        before: those of the tokens that come before these; None for none.
        """
        with hooked(hooks, ids.shape):
            out = self._bridge.original_model(input_ids=ids, past_key_values=before, use_cache=True)
        return out.logits[:, -1].float(), out.past_key_values

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The weight matrices that a pass multiplies by, by the names that they have in the Hugging Face model."""
        return matrices_of(self._bridge.original_model, lambda: self._run(self._some_ids()))

    def multiplied(self, ids: Tensor, products: Mapping[str, Product], hooks: Sequence[Hooked] = ()) -> Tensor:
        """Logits [B, T, n_vocab] with other products in the place of some matrices'; these keep their graph."""
        with hooked(hooks, ids.shape), multiplying(products, self.matrices if products else {}):
            logits: Tensor = self._run(ids).logits
        return logits.float()

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

    def _some_ids(self) -> Tensor:
        """Two contexts that differ in their last token."""
        ids = torch.arange(_CHECKED, device=self.device).repeat(2, 1)
        ids[1, -1] += 1
        return ids % self.n_vocab

    @torch.no_grad()
    def _tried(self, model: Any) -> Tensor:
        """The plain model's logits of some tokens. Raises SaeError where tokens are seen before their time."""
        try:
            logits: Tensor = model(input_ids=self._some_ids(), use_cache=False).logits.float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever hundreds of architectures do with a configuration that is not theirs
            raise SaeError(f"model = {self.name}: cannot be run: {one_line(error)}; give another model") from error
        if not logits.isfinite().any():
            raise SaeError(f"model = {self.name}: its logits are infinite or NaN; fetch or save its weights again")
        if not self._close(*logits.nan_to_num()[:, :-1]):
            raise SaeError(
                f"model = {self.name}: a {type(model).__name__} sees tokens before it predicts them, so it is "
                "not a causal language model; give one such as gpt2"
            )
        return logits.nan_to_num()

    def _check_whole(self, plain: Tensor) -> None:
        """Raise SaeError unless the wrapped model gives the plain one's logits, whole and from the last stream."""
        misfit = f"model = {self.name}: transformer_lens' bridge for {type(self._bridge.original_model).__name__}"
        try:
            logits = self.logits(self.final(self._some_ids()).flatten(0, 1)).view_as(plain)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as above
            raise SaeError(f"{misfit} does not fit it: {one_line(error)}; give another model") from error
        if not self._close(logits.nan_to_num(), plain):
            raise SaeError(f"{misfit} gives other logits than the model itself; give another model")

    def _close(self, one: Tensor, other: Tensor) -> bool:
        """Return True if logits agree but for the rounding of a whole model."""
        return bool((one - other).abs().max() <= torch.finfo(self.dtype).eps ** 0.5 * other.abs().max())

    @cached_property
    def _blocks_return_tensors(self) -> bool:
        seen: list[bool] = []
        with ExitStack() as stack, torch.no_grad():
            for block in self._bridge.blocks:
                handle = block.register_forward_hook(
                    lambda _block, _args, value: seen.append(isinstance(value, Tensor))
                )
                stack.callback(handle.remove)
            self._run(self._some_ids()[:1])
        return all(seen)


def _instead(new: Tensor, _: Tensor) -> Tensor:
    return new


class _Stop(Exception):
    """Everything asked for has been computed."""


@contextmanager
def hooked(hooks: Iterable[Hooked], shape: tuple[int, ...] | None = None) -> Iterator[None]:
    """Plain torch hooks on the bridge's hook points: `HookPoint.add_hook` would reshape `attn_z` there and back.

    Calls see [B, T, width] for tokens of `shape` [B, T], also where a block works on all rows in one list; where the
    shape is not given, they see what is there.
    """
    with ExitStack() as stack:
        for at, call in hooks:
            handle = at.register_forward_hook(lambda _module, _args, value, call=call: _in_rows(call, value, shape))
            stack.callback(handle.remove)
            if isinstance(at, HookPoint):  # points that compute a value only when they are being looked at
                at.fwd_hooks.append(LensHandle(handle))
                stack.callback(at.fwd_hooks.pop)
        yield


def _in_rows(call: Hook, value: Any, shape: tuple[int, ...] | None) -> Tensor | None:
    if not isinstance(value, Tensor):
        return None
    if shape is None:
        return call(value)
    if value.ndim == 2 and value.shape[0] == shape[0] * shape[1]:
        new = call(value.view(*shape, value.shape[1]))
        return None if new is None else new.reshape(value.shape)
    return call(value) if value.shape[:2] == shape and value.ndim == 3 else None


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    """A block that does nothing."""
    return args[0] if args else kwargs["hidden_states"]
