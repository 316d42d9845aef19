"""A toy model of superposition as pictures: its features in the plane, or how each of them answers to every other."""

import math
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from sae.cache.disk.parsing import whole
from sae.cache.errors import DamagedStore
from sae.cache.runs import Run
from sae.pipeline.report.charts import framed
from sae.pipeline.report.escaping import escape

TOY = "eval/toy.json"
MOST = 128  # features that are drawn: the first ones, the pairs among them
LEVELS = 8  # shades of a value
SIZE = 420.0  # of a picture, about a CSS pixel


class DrawnToy(BaseModel):
    """What is drawn of a toy: the first features [n, d], of how many, and learned directions [m, d] where d is 2."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    weight: list[list[float]]
    features: int
    learned: list[list[float]] = []

    @model_validator(mode="after")
    def _tables(self) -> Self:
        widths = {len(row) for row in [*self.weight, *self.learned]}
        if not 0 < len(self.weight) <= MOST or len(widths) != 1 or 0 in widths:
            raise ValueError("no tables of one width")
        return self

    @classmethod
    def of(cls, weight: Tensor, learned: Tensor) -> Self:
        """Of the toy that made the rows a dictionary was trained on, and the dictionary's directions."""
        plane = torch.nn.functional.normalize(learned.float(), dim=1) if weight.shape[1] == 2 else learned[:0]
        rows = [[round(value, 4) for value in row] for row in weight[:MOST].tolist()]
        return cls(weight=rows, features=len(weight), learned=[[round(v, 4) for v in row] for row in plane.tolist()])


def drawn_toy(run: Run) -> DrawnToy | None:
    """What a report is to draw, by the run's folder; None where its rows are of no toy."""
    if not (run.path / TOY).exists():
        return None
    try:
        said = run.read_json(TOY)
        whole(said, "features", 1)
        return DrawnToy.model_validate(said)
    except ValueError as error:
        raise DamagedStore(f"{run.path / TOY}: is not what was written; run `report({run.name})` again") from error


def toy_html(toy: DrawnToy) -> str:
    """The features in the plane, where that is what they are squeezed into; else the matrix of their products."""
    count, width = toy.features, len(toy.weight[0])
    about = f"<p>A toy model squeezed {count:,} features into {width:,} dimensions; the rows are its hidden states. "
    if width == 2:
        about += (
            "A line from the middle is what a feature adds to a row, as long as it is strong; dashed are the "
            "dictionary’s directions, of length 1.</p>"
        )
        keys = '<span class="key s0">features</span><span class="key s1">learned</span>'
        return f'{about}<div class="charts">{framed("Features in the plane", _plane(toy), "wide", keys)}</div>'
    shown = f"the first {len(toy.weight)} of them" if len(toy.weight) < count else "all of them"
    about += (
        f"Shown is W Wᵀ of {shown}: how much each answers to every other. On the diagonal are squared lengths, "
        "beside it is interference, which the toy’s ReLU has to cut away.</p>"
    )
    keys = '<span class="key s0">above 0</span><span class="key s4">below 0</span>'
    return f'{about}<div class="charts">{framed("W Wᵀ", _products(toy), "wide", keys)}</div>'


def _plane(toy: DrawnToy) -> str:
    longest = max([1.0, *(math.hypot(*row) for row in toy.weight)])
    scale, middle = 0.44 * SIZE / longest, SIZE / 2

    def line(row: list[float], kind: str) -> str:
        x, y = middle + scale * row[0], middle - scale * row[1]
        return f'<line class="line {kind}" x1="{middle:.1f}" y1="{middle:.1f}" x2="{x:.1f}" y2="{y:.1f}"></line>'

    body = f'<circle class="grid" cx="{middle:.1f}" cy="{middle:.1f}" r="{scale:.1f}" fill="none"></circle>'
    body += "".join(line(row, "s1 dashed") for row in toy.learned)
    for number, row in enumerate(toy.weight):
        length = math.hypot(*row) or 1.0
        out = scale * (length + 0.06 * longest)
        x, y = middle + out * row[0] / length, middle - out * row[1] / length
        body += line(row, "s0")
        body += f'<text class="tick" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number}</text>'
    told = ", ".join(f"{number}: ({row[0]:.2f}, {row[1]:.2f})" for number, row in enumerate(toy.weight))
    return _svg(body, f"Features in the plane: {told}")


def _products(toy: DrawnToy) -> str:
    """Cells shaded by size, in as many paths as there are shades."""
    weight = np.array(toy.weight)
    products = weight @ weight.T
    n, most = len(products), float(np.abs(products).max()) or 1.0
    cell = SIZE / n
    levels = np.ceil(np.abs(products) / most * LEVELS - 0.5).clip(0, LEVELS).astype(int)
    body = ""
    for sign, kind in ((1, "s0"), (-1, "s4")):
        for level in range(1, LEVELS + 1):
            cells = np.argwhere((levels == level) & (np.sign(products) == sign))
            path = "".join(f"M{x * cell:.1f} {y * cell:.1f}h{cell:.2f}v{cell:.2f}h-{cell:.2f}z" for y, x in cells)
            body += f'<path class="cell {kind}" fill-opacity="{level / LEVELS:.3f}" d="{path}"></path>' if path else ""
    off = products[~np.eye(n, dtype=bool)]
    told = f"diagonal {products.diagonal().min():.2f} to {products.diagonal().max():.2f}"
    told += f", others {off.min():.2f} to {off.max():.2f}" if n > 1 else ""
    return _svg(body, f"Products of features: {told}")


def _svg(body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {SIZE:g} {SIZE:g}" role="img" aria-label="{escape(label)}" class="square">{body}</svg>'
