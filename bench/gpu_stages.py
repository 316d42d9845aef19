"""The stages of bench/gpu.py, which starts this: one after the other, for as long as the card answers.

    python bench/gpu_stages.py STAGE,STAGE FOLDER [--small] [--peers PYTHON]

Prints a line a figure, and one when a stage is over. Where the card does nothing more for this process, which is so
after some errors, it ends with the code ANEW: what is left is for a new one.
"""

import argparse
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench import harvest as harvesting
from bench import start, subjects
from bench.card import CARD, SMALL, Bench, Line
from bench.gpu import ANEW, DONE, STAGES
from bench.peer import Peer
from bench.planted import planted_rows
from sae.cache.disk.durable import write_in
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Loader
from sae.cache.store.writer import WRITERS
from sae.pipeline import saes
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import kernels, uncounted
from sae.pipeline.train import optimising
from sae.pipeline.train.stage import TrainConfig, open_run, train
from sae.pipeline.train.trainer import products

OF_TOPK = {"batchtopk": 1.3, "jumprelu": 1.5, "l1": 1.5, "matryoshka": 1.6, "gated": 1.6}
PEERS = ("sparsify topk, fused Adam, bfloat16", "sparsify topk, fused Adam", "dictionary_learning topk")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "aten::_local_scalar_dense", "aten::nonzero")


def right(bench: Bench) -> Iterator[Line]:
    """Each architecture's gradients by kernels, and on the card, against the CPU's."""
    d, m = 64, 512
    x = planted_rows(256, d, 0)
    for arch, kind in saes.ARCHITECTURES.items():
        if not issubclass(kind, saes.SAE):
            continue
        config = saes.parse({"arch": arch, "d_sae": m})
        learns = subjects.learns_its_sparsity(config)
        for share in (None, 0.02, 0.5) if learns else (None,):
            what = f"{arch}: worst" if share is None else f"{arch} with {share:g} active: worst"
            with bench.tried(what):
                here, there = (gradients(config, x, share, device) for device in ("cpu", bench.sizes.device))
                worst = max(float((here[name] - there[name]).norm() / (here[name].norm() + 1e-12)) for name in here)
                yield Line(f"{what} gradient against the CPU's, relative", worst, "", most=2e-3)


def gradients(config: saes.Config, x: torch.Tensor, share: float | None, device: str) -> dict[str, torch.Tensor]:
    """A loss's gradients on a device, by parameter; share: of the latents that are active, where it is learned."""
    torch.manual_seed(0)
    sae = saes.create(config, x.shape[1])
    sae.initialise(x)
    clock = saes.FINISHED if "vsae" in config.arch else saes.Clock(5, 100, len(x))
    if share is not None:  # taken for few; of half of them entries have no room in lists
        subjects.make_sparse(sae, x, share)
        sae.firing_rate.fill_(uncounted.FEW)
        sae.look_ahead(clock)
    sae.to(device).loss(x.to(device), clock=clock).total.backward()
    grads = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in sae.named_parameters()}
    return {name: grad.cpu().double() for name, grad in grads.items()}


def steps(bench: Bench) -> Iterator[Line]:
    """Whole steps of TopK, and the encoder's product alone."""
    s = bench.sizes
    for batch, wanted in zip(s.batches, (2.0, 5.0), strict=True):
        x, weight = (torch.randn(n, s.d, device=bench.device).bfloat16() for n in (batch, s.m))
        product = bench.milliseconds(functools.partial(torch.mm, x, weight.T))
        yield Line(f"batch {batch}: the encoder's product in bfloat16", product, "ms")
        own = bench.step(bench.member("topk", batch, "bfloat16"), batch)
        yield Line(f"batch {batch}: topk", own, "ms", most=wanted)
    for batch in s.batches:
        with bench.tried(f"batch {batch}: topk, plain"):
            plain = bench.step(bench.member("topk", batch, "bfloat16", kernels="plain"), batch)
            yield Line(f"batch {batch}: topk, plain", plain, "ms")


def of_topk(bench: Bench, arch: str, most: float) -> Iterator[Line]:
    """Steps of another architecture, of TopK's. A stage each: what one does to the card is not the next one's."""
    for batch in bench.sizes.batches:
        own = bench.step(bench.member("topk", batch, "bfloat16"), batch)
        member = bench.member(arch, batch, "bfloat16")
        yield Line(f"batch {batch}: {arch}, of topk's", bench.step(member, batch) / own, "", most=most)
        if bench.device.type == "cuda":
            held = bench.held(member, batch)
            yield Line(f"batch {batch}: {arch}, held in a step, of batch times latents in float32", held, "")


def precisions(bench: Bench) -> Iterator[Line]:
    """Steps in other precisions than bfloat16."""
    batch = bench.sizes.batches[0]
    for precision in ("float32", "tf32") if bench.device.type == "cuda" else ("float32",):
        for arch in ("topk", "l1"):
            with bench.tried(f"{arch} in {precision}"):
                taken = bench.step(bench.member(arch, batch, precision), batch)
                yield Line(f"batch {batch}: {arch} in {precision}", taken, "ms")


def update(bench: Bench) -> Iterator[Line]:
    """What follows the gradients, over all parameters of a TopK, by kernels and by torch's own operations."""
    batch = bench.sizes.batches[0]
    x = planted_rows(batch, bench.sizes.d, 0).to(bench.device)
    for clip, said in ((1.0, "clipping"), (None, "no clipping")):
        for way, most in (("auto", 0.5), ("plain", None)):
            member = bench.member("topk", batch, "bfloat16", clip=clip, kernels=way)
            subjects.take_step(member, x)  # gradients stay
            step = functools.partial(optimising.take_step, member.sae, member.optimiser, clip)
            with products(member.config, bench.device):
                taken = bench.milliseconds(step)
            yield Line(f"update of {bench.sizes.m} latents, {said}, kernels {way}", taken, "ms", most=most)


def peers(bench: Bench) -> Iterator[Line]:
    """Steps of other tools, those that `--peers` has, and ours beside them."""
    s = bench.sizes
    for batch, most in zip(s.batches, (0.45, 0.4), strict=True) if bench.peers else ():
        peer = Peer(str(bench.peers), "step_peers.py", *map(str, (batch, s.d, s.m, s.k, 1, "wall", s.device)))
        if peer.missing:
            raise RuntimeError(f"--peers {bench.peers}: is no interpreter with torch")
        own = bench.step(bench.member("topk", batch, "bfloat16"), batch)
        for case in PEERS:
            with bench.tried(f"batch {batch}: {case}"):
                taken = 1e3 * [peer.rate(case) for _ in range(2)][-1]  # at first it compiles
                if math.isnan(taken):
                    raise RuntimeError("it cannot, or is not there; the reason is above")
                yield Line(f"batch {batch}: {case}", taken, "ms")
                yield Line(f"batch {batch}: topk, of it", own / taken, "", most=most if case == PEERS[0] else None)


def dead(bench: Bench) -> Iterator[Line]:
    """TopK with dead latents, of it without any."""
    batch = bench.sizes.batches[0]
    alive = bench.step(bench.member("topk", batch, "bfloat16"), batch)
    for share in (64, 16, 2):
        member = bench.member("topk", batch, "bfloat16")
        subjects.kill_latents(member.sae, bench.sizes.m // share)
        taken = bench.step(member, batch) / alive
        yield Line(f"topk with 1/{share} of its latents dead, of it without", taken, "", most=1.3)


def profile(bench: Bench) -> Iterator[Line]:
    """Launches of a TopK step, and what takes longest."""
    member, batch = bench.member("topk", bench.sizes.batches[0], "bfloat16"), bench.sizes.batches[0]
    x = planted_rows(batch, bench.sizes.d, 0).to(bench.device)
    bench.milliseconds(lambda: subjects.take_step(member, x))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(5):
            subjects.take_step(member, x)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    found = seen.key_averages()
    launched = sum(one.count for one in found if one.key in LAUNCHES)
    waited = sum(one.count for one in found if one.key in WAITS)
    yield Line("topk: launches a step", launched / 5, "", most=80)
    yield Line("topk: waits a step", waited / 5, "", most=0)
    time_of = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    for one in sorted(found, key=lambda one: -getattr(one, time_of))[:10]:
        yield Line(f"of it {one.key[:70]} ({one.count / 5:g} times)", getattr(one, time_of) / 5e3, "ms")


def many(bench: Bench) -> Iterator[Line]:
    """Eight narrow dictionaries on one stream, of one."""
    batch, narrow = bench.sizes.batches[0], bench.sizes.m // 6
    members = [bench.member("topk", batch, "bfloat16", narrow, seed=seed) for seed in range(8)]
    x = planted_rows(batch, bench.sizes.d, 0).to(bench.device)
    one = bench.milliseconds(functools.partial(subjects.together(members[:1], batch), x))
    in_turn = bench.milliseconds(lambda: [subjects.take_step(member, x) for member in members])
    for count in (2, 8):
        taken = bench.milliseconds(functools.partial(subjects.together(members[-count:], batch), x))
        yield Line(f"{count} topk of {narrow} latents, of one", taken / one, "", most=5 if count == 8 else None)
    yield Line("the 8 one after another, of one", in_turn / one, "")


def loader(bench: Bench) -> Iterator[Line]:
    """Rows to float32 on the card, of the default codec by the usual threads and by some numbers of them."""
    cases: list[tuple[str, int | None, float | None]] = [("int8", None, 4), ("int8:zstd=none", None, None)]
    cases += [("int8", threads, None) for threads in (1, 2, 4, 8, 12)]
    for codec, threads, least in cases:
        store, batch = bench.store(codec), bench.sizes.batches[0]
        with Loader(store, batch, threads=threads, device=bench.device) as batches:
            stream, waited = iter(batches), 0.0
            for _ in range(16 * store.chunk_rows // batch):  # past what is read ahead
                next(stream)
            taken, begun = 0, time.perf_counter()
            while (spent := time.perf_counter() - begun) < bench.sizes.seconds:
                taken += len(next(stream))
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
                waited = time.perf_counter() - begun - spent
            yield Line(
                f"loader, {codec}, {batches.threads} threads", taken / (spent + waited) / 1e6, "M rows/s", least=least
            )


class Watch(Silent):
    """When the first step of a training had been asked for, and when the last had been taken."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.left, self.device = steps, device
        self.first = self.last = 0.0

    def advance(self, n: int, **fields: object) -> None:
        self.left -= n
        if not self.left and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.last = time.perf_counter()
        self.first = self.first or self.last


def training(bench: Bench) -> Iterator[Line]:
    """All of a training, from the store to the run folder, twice: at first kernels are compiled, as they are needed."""
    s, dataset = bench.sizes, Dataset.of(bench.store("int8"))
    sae = {"arch": "topk", "k": s.k, "d_sae": s.m}
    for when, steps, least, most in (("first", s.steps, None, None), ("again", 3 * s.steps, 2.5, 4)):
        given = {"sae": sae, "batch": s.batches[0], "steps": steps, "precision": "bfloat16"}
        watch, begun = Watch(steps, bench.device), time.perf_counter()
        run = open_run(TrainConfig.model_validate(given), dataset, bench.folder / f"trained-{when}", None, resume=False)
        last = train([run], dataset, watch, device=s.device)[0]
        ended = time.perf_counter()
        rate = (steps - 1) * s.batches[0] / (watch.last - watch.first) / 1e6
        yield Line(f"training in bfloat16, {when}, from its first step to its last", rate, "M rows/s", least=least)
        yield Line("from its beginning to its first step, without the start of Python", watch.first - begun, "s", most)
        yield Line("from its last step to its end", ended - watch.last, "s")
        yield Line("its FVU", last["fvu"], "")
        yield Line("its dead latents", last["dead"], "")


def starting(bench: Bench) -> Iterator[Line]:
    """Commands in processes of their own, twice: the first may compile kernels that Triton has not kept."""
    s, folder = bench.sizes, bench.folder / "commands"
    sizes = start.Sizes(s.m, s.batches[0], 8 * s.batches[0], s.judged, s.device)
    start.prepare(folder, sizes)
    for number, when in enumerate(("first", "again")):
        for command, words in start.commands(sizes, f"run-{number}").items():
            found = start.run(words, folder)
            for moment, what in start.MOMENTS[command].items():
                most = start.AT_MOST.get((command, moment)) if number else None
                yield Line(f"{what}, {when}", found[moment].clock, "s", most=most)


def harvests(bench: Bench) -> Iterator[Line]:
    """The whole stage at GPT-2 small's shape, of the bare forward; and what the folder takes, which bounds it."""
    where, dtype, contexts = bench.device, torch.bfloat16, 256 if bench.device.type == "cuda" else 2
    store = harvesting.token_store(bench.folder / "tokens", bench.sizes.contexts)
    tokens = torch.from_numpy(store.contexts(0, store.n_contexts).astype("int64")).to(where)
    bare = GPT2LMHeadModel(GPT2Config()).eval().to(where, dtype)
    model = LanguageModel.boot("random:gpt2", device=str(where), dtype="bfloat16")

    def stage(codec: str, sites: tuple[str, ...]) -> tuple[float, int]:
        """Seconds, and bytes that were written."""
        config = HarvestConfig(
            model="random:gpt2", layer=(6,), site=sites, batch_tokens=contexts * harvesting.CONTEXT, dtype="bfloat16",
            codec=codec,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            begun = time.perf_counter()
            source = LanguageModelSource.over(config, [store], Silent(), model=model)
            made = harvest(source, Path(folder), Silent()).stores["train"]
            return time.perf_counter() - begun, sum(one.manifest.stored_bytes for one in made)

    def forward() -> float:
        begun = time.perf_counter()
        harvesting.bare_forward(bare, 6, tokens, contexts)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    harvesting.bare_forward(bare, 6, tokens[: 2 * contexts], contexts)
    floor = min(forward() for _ in range(2))
    yield Line("bare forward in bfloat16", tokens.numel() / floor / 1e6, "M tokens/s")
    one, two = ("mlp_out",), ("mlp_out", "resid_post")
    for codec, sites, least in (("int8", one, 0.85), ("int8", two, None), ("bfloat16", one, None)):
        tries = 1 if least is None else 2  # at first memory is pinned, and kernels are loaded
        taken, size = min(stage(codec, sites) for _ in range(tries))
        what = f"harvest of {', '.join(sites)} in bfloat16, codec {codec}"
        yield Line(f"{what}, of the bare forward", floor / taken, "", least=least)
        yield Line(f"{what}: written", size / taken / 1e9, "GB/s")
    yield Line("the folder: flushed files of 8 MiB", flushed(bench.folder, 8 << 20, 64), "GB/s")


def flushed(folder: Path, size: int, files: int) -> float:
    """GB/s of flushed files as a store's writers write them."""
    data, begun = os.urandom(size), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as there, ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda number: write_in(Path(there), str(number), data), range(files)))
        return size * files / (time.perf_counter() - begun) / 1e9


def tests(bench: Bench) -> Iterator[Line]:
    """What only a card can show: kernels as compiled, no wait that the driver sees, equal bytes of equal runs."""
    files = [f"tests/pipeline/{name}.py" for name in ("train/test_gpu", "train/test_optimising")]
    files += [f"tests/pipeline/saes/test_{name}.py" for name in ("kernels", "counting", "uncounted")]
    files += ["tests/cache/test_window_buffer.py", "tests/cache/loader/test_rooms.py"]  # bytes stored, rows read
    files += ["tests/pipeline/evaluate/test_evaluate.py::test_a_card_finds_what_the_host_finds"]
    files += ["tests/pipeline/interpret/test_statistics.py::test_a_card_counts_what_the_host_counts"]
    few = ["-k", "test_gpu and topk"] if bench.device.type == "cpu" else ["-n", "12"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-rf", "--tb=line", *few, *files]
    command += ["-W", "default"]  # versions beside this one may warn of what ours do not
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths})
    yield Line("tests on the card: exit code", done.returncode, "", most=0)


BY_NAME: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "topk": steps, "train": training, "harvest": harvests,
    **{arch: functools.partial(of_topk, arch=arch, most=most) for arch, most in OF_TOPK.items()},
    "peers": peers, "right": right, "loader": loader, "many": many, "dead": dead, "start": starting, "profile": profile,
    "precision": precisions, "update": update, "tests": tests,
}  # fmt: skip
assert [*BY_NAME] == [*STAGES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="STAGE,STAGE")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peers", metavar="PYTHON")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --small tries it on the CPU")
    devices.take_threads(None, print)  # as the command line does
    card = "the CPU" if args.small else torch.cuda.get_device_name()
    hindrance = None if args.small else kernels.hindrance(torch.device("cuda"))
    print(f"{card}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if hindrance is not None:
        print(f"no kernels: {hindrance}", flush=True)
    bench = Bench(SMALL if args.small else CARD, Path(tempfile.mkdtemp(dir=args.folder)), args.peers)
    for name in args.names.split(","):
        begun = time.perf_counter()
        with bench.tried(name):
            for line in BY_NAME[name](bench):
                bench.say(line)
        bench.say(f"{DONE}{name}: {time.perf_counter() - begun:.0f} s")
        if not bench.answers():
            os._exit(ANEW)  # whatever would be taken down in order needs the card


if __name__ == "__main__":
    main()
