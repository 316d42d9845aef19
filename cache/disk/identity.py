"""From a recipe to a folder name.

A recipe is a JSON object with everything that changes the bytes of a store and nothing that does not.
Its canonical text (sorted keys, no spaces, ASCII) is hashed with SHA-256; a store's folder is
`<slug>-<first 8 hex digits>`. The slug is for people, the hash is the identity.
"""

import hashlib
import json
import re
from typing import Any

Recipe = dict[str, Any]


def canonical(recipe: Recipe) -> str:
    """The one text of a recipe. Raises TypeError for values JSON cannot hold, ValueError for NaN."""
    return json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(recipe: Recipe) -> str:
    """Eight hex digits that name a recipe."""
    return hashlib.sha256(canonical(recipe).encode()).hexdigest()[:8]


def key(slug: str, recipe: Recipe) -> str:
    """Folder name of the store a recipe describes."""
    name = readable(slug)
    return f"{name}-{digest(recipe)}" if name else digest(recipe)


def readable(slug: str) -> str:
    """A name for people, of letters, digits, dots, dashes and underscores alone; empty where nothing is left of it."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", slug)[:80].strip("-.")
