"""The cohort engine on a GPU, with models of released shapes and random weights. Needs no network.

    python benchmarks/gpu.py [--quick] [--model florence-2-base] [--target language] [--profile]

Three sides work by turns in one process, on the same number of synthetic rows (32 tokens in, 32
out, a picture of the model's own size). The base model is in bf16, the factors are in fp32.

- sequential: one client after another (the reference engine)
- cohort: all clients in one pass, or as many as memory allows (the column `pass`)
- plain: one adapter, trained on the rows of a whole pass as one batch (the reference engine with
  one client a pass). This is ordinary LoRA training of as many tokens, the limit of the hardware.

The script prints the median milliseconds of a step of all clients, the cohort's share of the speed
of plain, and the cohort's TFLOP/s. On an H100 or H200 it also prints the share of the peak (MFU).
Operations are those of the products, forward and back. The last columns are each side's peak
memory: the weights of the model plus the memory of a step. The pictures are on the GPU from the
start. With `language` only the cohort engine caches the features of the vision tower. The last line
is `RATIO <number> <what>`.

`--kept` trains nothing. It prints the memory of a pass as the engine measures it before a run: the
weights, and for each client its adapter and the bytes that its batch keeps for the backward pass.
This works on a CPU too.

Without a GPU the script prints a line and ends. `--device cpu --quick` runs it on small shapes, as
a test of the script itself.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import _shapes
import _sides
from _common import Work, environment, paired, ratio, seconds
from _profile import profile, show
from fedvlm.engines import memory

PEAK = {"H100": 989.4e12, "H200": 989.4e12}  # dense bf16 operations a second, from the data sheet
GB = 1e9


def small(name: str) -> _shapes.Shape:
    """A shape of the same kind with a few narrow layers, for a machine without a GPU."""
    shape = _shapes.SHAPES[name]()
    text, vision = shape.config.text_config, shape.config.vision_config
    text.update({"vocab_size": 1000})
    shape.config.update({"image_token_id": 5})
    if name == "smolvlm-500m":
        text.update({"hidden_size": 60, "intermediate_size": 64, "num_hidden_layers": 2})
        text.update({"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 4})
        vision.update({"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2})
        return replace(shape, image_tokens=4, side=128, question=4, answer=4)
    heads = (2, 2, 2, 2)
    vision.update({"embed_dim": (16, 16, 16, 16), "num_heads": heads, "num_groups": heads})
    vision.update({"projection_dim": 64, "depths": (1, 1, 1, 1)})
    for part in ("encoder", "decoder"):
        text.update({f"{part}_layers": 2, f"{part}_ffn_dim": 64, f"{part}_attention_heads": 4})
    text.update({"d_model": 64})
    return replace(shape, image_tokens=5, side=64, question=4, answer=4)


def build(
    shape: _shapes.Shape, width: int, batch: int, target: str, options: argparse.Namespace
) -> tuple[dict[str, Work], float]:
    """The work of each side with `width` clients in a pass, and the bytes of the weights."""
    device, clients = torch.device(options.device), options.clients
    dtype = torch.bfloat16
    settings = {
        "sequential": ("reference", clients, batch, 1),
        "cohort": ("cohort", clients, batch, width),
        "plain": ("reference", clients // width, width * batch, 1),
    }
    works: dict[str, Work] = {}
    for side, (engine, count, size, at_once) in settings.items():
        model = _shapes.build(shape, device, dtype)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        made, partition = _shapes.engine(
            engine, model, shape, count, at_once, size, options.steps, target
        )
        works[side] = _sides.training(made, partition.clients)
    return works, weights


def peak(work: Work) -> float:
    """Peak bytes of a piece of work, above the bytes allocated before."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept(name: str, batch: int, target: str, options: argparse.Namespace) -> None:
    """Prints a row of memory, as the engine measures it on one step of two clients."""
    shape, device = _shapes.SHAPES[name](), torch.device(options.device)
    model = _shapes.build(shape, device, torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    made, partition = _shapes.engine("cohort", model, shape, 2, 2, batch, 1, target)
    made.stack.load([made.adapter] * 2, made.device, lambda _: True)
    made.stack.activate([0, 1])
    made.model.train()
    rows = np.concatenate([partition.splits[c].train[:batch] for c in partition.clients])
    batches = memory.kept_for_backward(made.model, lambda: made._terms(rows).loss) // 2
    each = memory.COPIES * sum(t.nbytes for t in made.adapter.values())
    bare, whole = (weights + options.clients * (each + n * batches) for n in (0, 1))
    spare = weights + options.clients * (each + memory.SPARE * batches)
    print(
        f"{name:<17}{target:>11}{options.clients:>8}{batch:>6}"
        + "".join(f"{n / GB:>12.2f}" for n in (weights, each, batches, bare, whole, spare)),
        flush=True,
    )


def compare(
    name: str, width: int, batch: int, target: str, options: argparse.Namespace
) -> float | None:
    """Prints a row of the table.

    Returns:
        The speed of the cohort engine over the sequential side, or None where a pass of `width`
        clients does not fit into memory.
    """
    try:
        return _compare(name, width, batch, target, options)
    except torch.OutOfMemoryError:
        return None


def _compare(name: str, width: int, batch: int, target: str, options: argparse.Namespace) -> float:
    shape = small(name) if options.device == "cpu" else _shapes.SHAPES[name]()
    works, weights = build(shape, width, batch, target, options)
    for work in works.values():
        work()
    memory = {side: (peak(work) + weights) / GB for side, work in works.items()}
    # The counter lacks fused attention with fewer keys than queries. The products are the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        works["cohort"]()
    timed = {side: lambda work=work: seconds(work) for side, work in works.items()}
    taken = paired(timed, options.repeats)
    faster, low, high = ratio(taken["sequential"], taken["cohort"])
    share, _, _ = ratio(taken["plain"], taken["cohort"])
    per = {side: 1000 * median(times) / options.steps for side, times in taken.items()}
    speed = counted.get_total_flops() / options.steps / (per["cohort"] / 1000)
    used = [v for k, v in PEAK.items() if options.device == "cuda" and k in device_name()]
    print(
        f"{name:<17}{target:>11}{options.clients:>8}{width:>6}{batch:>6}"
        + "".join(f"{per[side]:>12.1f}" for side in works)
        + f"{faster:>7.2f}{f'{low:.2f} to {high:.2f}':>15}{100 * share:>9.0f} %"
        + f"{speed / 1e12:>9.1f}{f'{100 * speed / used[0]:.0f} %' if used else '-':>6}  "
        + " / ".join(f"{memory[side]:.1f}" for side in works),
        flush=True,
    )
    if options.profile:
        show(f"cohort, {name}, {target}, batch {batch}", profile(works["cohort"], rank=8))
    return faster


def device_name() -> str:
    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batch 2, all-linear, two models")
    parser.add_argument("--model", default=",".join(_shapes.SHAPES), help="default: %(default)s")
    parser.add_argument("--target", default="all-linear,language", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", default="2,8", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of a round (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--profile", action="store_true", help="print the cohort engine's time by kind"
    )
    parser.add_argument("--kept", action="store_true", help="print the planned memory instead")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no GPU that this PyTorch can use; nothing was measured")
        return
    models = options.model.split(",")
    if unknown := set(models) - set(_shapes.SHAPES):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    if options.kept:
        heads = ("weights", "a client", "its batch", "all but", "all", "and spare")
        print(environment())
        print(f"{'model':<17}{'LoRA':>11}{'clients':>8}{'batch':>6}", *(f"{h:>11}" for h in heads))
        for name in models:
            for target in options.target.split(","):
                for batch in map(int, options.batch.split(",")):
                    kept(name, batch, target, options)
        return
    if options.device == "cpu":
        options.steps, options.clients = 1, min(4, options.clients)
    targets, batches = options.target.split(","), [int(b) for b in options.batch.split(",")]
    if options.quick:
        targets, batches = targets[:1], batches[:1]
        models = [m for m in models if m != "florence-2-large"]
    print(environment())
    print("milliseconds a step of all clients; ratio: sequential / cohort; memory in GB")
    print(
        f"{'model':<17}{'LoRA':>11}{'clients':>8}{'pass':>6}{'batch':>6}{'sequential':>12}{'cohort':>12}"
        f"{'plain':>12}{'ratio':>7}{'range':>15}{'of plain':>11}{'TFLOP/s':>9}{'MFU':>6}"
        "  memory (the same order)"
    )
    found: dict[tuple[Any, ...], float] = {}
    for name in models:
        for target in targets:
            for batch in batches:
                key, width = (name, target, batch), options.clients
                while key not in found and width:
                    faster = compare(name, width, batch, target, options)
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    if faster is not None:
                        found[key] = faster
                    width //= 2
    if not found:
        raise SystemExit("nothing fitted into the GPU's memory")
    (name, target, batch), faster = next(iter(found.items()))
    small_ones = " (a small model of its kind)" if options.device == "cpu" else ""
    print(
        f"RATIO {faster:.2f} cohort engine over sequential, {name}{small_ones}, {target}, "
        f"{options.clients} clients, batch {batch}"
    )


if __name__ == "__main__":
    main()
