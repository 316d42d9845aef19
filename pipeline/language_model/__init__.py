"""A language model as the stages see it: token ids in; activations at a site, or losses with a site replaced, out.

The only place that touches transformers and transformer_lens, and they are imported when a model is booted, not before.

files       a name -> a folder with config.json and safetensors weights (local, embedded, or from the hub)
loading     the folder -> a Hugging Face model, whole or an error; random weights only on request
wrapping    transformer_lens' bridge around it; attention and norms stay the model's own
promises    whether a site holds what its name says, by trying
bridge      its hook points, and passes that stop where nothing more is needed
model       `LanguageModel`: the passes the stages ask for
"""

from pipeline.language_model.model import SITES, Comparison, LanguageModel, Point, Replacement, Spliced

__all__ = ["SITES", "Comparison", "LanguageModel", "Point", "Replacement", "Spliced"]
