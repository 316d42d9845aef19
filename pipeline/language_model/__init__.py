"""A language model as the stages see it: token ids in; activations at a site, or losses with a site replaced, out.

The only place that touches transformers and transformer_lens, and they are imported when a model is booted, not before.

files       a name -> a folder with config.json and safetensors weights (local, embedded, or from the hub)
config      config.json, which may come from anyone -> a configuration
weights     safetensors files -> a model that takes all of them
loading     the folder -> a Hugging Face model, whole or an error; random weights only on request
wrapping    transformer_lens' bridge around it; attention and norms stay the model's own
promises    whether a site holds what its name says, by trying
bridge      its hook points, and passes that stop where nothing more is needed
interventions  what is done to activations while a model runs
matrices    weight matrices, and passes in which other products stand in their place
model       `LanguageModel`: the passes the stages ask for
sites       the names of the places
"""

from typing import TYPE_CHECKING, Any

from sae.pipeline.language_model.sites import SITES, Point

if TYPE_CHECKING:
    from sae.pipeline.language_model.model import Comparison, LanguageModel, Spliced

__all__ = ["SITES", "Comparison", "LanguageModel", "Point", "Spliced"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: a list of the sites should not take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from sae.pipeline.language_model import model

    return getattr(model, name)
