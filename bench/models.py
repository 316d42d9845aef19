"""Which families of models are right at which sites: a tiny random model of each, against plain Hugging Face.

    python bench/models.py [FAMILY...]

Prints a table for humans: the sites each family has, and the largest deviation (over the largest value) of sites,
logits, and of the losses after half a site is taken away. What is compared is in tests/support/model_families.py.
"""

import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

from support.model_families import FAMILIES, compared, save_family
from transformers.utils import logging

from sae.pipeline.language_model import SITES


def main(names: list[str]) -> None:
    """Print the table of the families named, or of all."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print("| family | sites | at sites | logits | spliced |\n|---|---|---|---|---|")
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            off = compared(name, save_family(name, Path(folder) / "model"))
        lacks = [site for site in SITES if site not in off]
        sites = "all" if not lacks else "all but " + ", ".join(lacks)
        if len(lacks) > len(SITES) // 2:
            sites = ", ".join(site for site in SITES if site in off)
        worst = max(off[site] for site in SITES if site in off)
        print(f"| {name} | {sites} | {worst:.0e} | {off['logits']:.0e} | {off['spliced']:.0e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
