"""Trains the bundled tiny vision-language model from scratch on generic scenes, on one CPU thread.

    python scripts/train_tiny.py --minutes 60 --out src/fedvlm/assets/tiny

A step renders `--pictures` new scenes and asks `--questions` questions about each. The questions of
a picture share one row: the tokens of the picture, then each question with its answer. A question
and its answer see the picture and themselves, but no other question (`pack`). So their training
equals training alone, at a third of the cost. The loss is cross-entropy on answers and their end
token. A temporary head that predicts the content of each image patch speeds up the start. Its
weight falls to zero. The data of a step is a function of (seed, step), so `--resume` continues an
interrupted run exactly.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import _tiny as tiny
from fedvlm.data import compose, questions, render
from hints import Hints
from muon import Muon

LETTER_SHARE = 0.1  # share of pictures with letters; the other pictures show things


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if (work / "tokenizer.json").exists():
        tokenizer = tiny.FastTokenizer.from_pretrained(work)
    else:
        tokenizer = tiny.build_tokenizer(tiny.corpus())
        tokenizer.save_pretrained(work)
    model = tiny.build_model(
        tokenizer, vision_layers=args.vision_layers, text_layers=args.text_layers, seed=args.seed
    )
    head = Hints(model.config.vision_config.hidden_size, tokenizer)
    optimizers = build_optimizers(model, head, args)
    step, spent = resume(work, model, head, optimizers) if args.resume else (0, 0.0)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step}", flush=True
    )
    start, losses = time.time(), defaultdict(list)
    while step < args.steps:
        minutes = spent + (time.time() - start) / 60
        if minutes >= args.minutes:
            break
        done = max(step / args.steps, minutes / args.minutes)
        schedule(optimizers, step, done, args)
        parts = train_step(model, head, tokenizer, optimizers, args, step, done)
        for name, value in parts.items():
            losses[name].append(value)
        step += 1
        if step % args.log == 0:
            shown = "  ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(losses.items()))
            print(f"step {step}  {spent + (time.time() - start) / 60:.1f} min  {shown}", flush=True)
            losses.clear()
        if step % args.check == 0:
            scores = score(model, tokenizer, args.seed + 1, 300)
            print(
                f"step {step} held out: " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()),
                flush=True,
            )
            save_state(work, model, head, optimizers, step, spent + (time.time() - start) / 60)
    minutes = spent + (time.time() - start) / 60
    save_state(work, model, head, optimizers, step, minutes)
    scores = score(model, tokenizer, args.seed + 1, 3000)
    print(
        f"step {step} held out: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True
    )
    if args.out:
        tiny.save(model, tiny.build_processor(tokenizer), args.out)
        note(Path(args.out) / "TRAINING.json", model, args, step, minutes, scores)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1_000_000)
    add(
        "--minutes",
        type=float,
        default=60.0,
        help="wall minutes, with the earlier parts of a resumed run",
    )
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--pictures", type=int, default=32, help="pictures a step")
    add("--questions", type=int, default=5, help="questions a picture")
    add("--vision-layers", type=int, default=3)
    add("--text-layers", type=int, default=4)
    add("--rate", type=float, default=2e-3, help="learning rate of Muon, for matrices")
    add(
        "--adam-rate",
        type=float,
        default=1.5e-3,
        help="learning rate of AdamW, for embeddings, norms and biases",
    )
    add("--warmup", type=int, default=100)
    add("--optimizer", choices=("muon", "adamw"), default="muon")
    add("--log", type=int, default=50)
    add("--check", type=int, default=500)
    add("--work", default="work/tiny", help="folder of the resumable state")
    add("--out", default="", help="folder of the export at the end")
    add("--resume", action="store_true")
    return parser.parse_args()


def build_optimizers(model, head, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all other parameters."""
    matrices, others = [], list(head.parameters())
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner and args.optimizer == "muon" else others).append(weight)
    made = [torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        made.append(Muon(matrices, lr=args.rate, weight_decay=0.01))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def schedule(optimizers, step: int, done: float, args) -> None:
    """Linear warm-up, then a cosine to 2 %, over the steps or minutes, whichever ends first."""
    factor = min(1.0, (step + 1) / args.warmup) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def train_step(
    model, head, tokenizer, optimizers, args, step: int, done: float
) -> dict[str, float]:
    rows = sample(args.seed, step, args.pictures, args.questions, easy=max(0.0, 1 - step / 600))
    batch = pack(rows, tokenizer, random.Random(f"drill/{args.seed}/{step}"))
    logits, patches, tokens = forward(model, batch)
    each = F.cross_entropy(logits, batch["target_ids"], reduction="none")
    loss = (each * batch["target_weight"]).sum() / batch["target_weight"].sum()
    weight = 0.5 * min(1.0, max(0.0, (0.6 - done) / 0.3))
    hint = torch.zeros(())
    if weight > 0:
        hint = head([row[0] for row in rows], patches, tokens, model.lm_head.weight)
    total = loss + weight * hint
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    parts = {"loss": loss.item(), "hint": hint.item()}
    kinds, each = batch["target_kind"], each.detach().numpy()
    for kind in set(kinds):
        parts[f"~{kind}"] = float(each[[k == kind for k in kinds]].mean())
    return parts


def sample(seed: int, step: int, pictures: int, per: int, easy: float = 0.0):
    """The scenes of a step and their questions: [(scene, pixels [64, 64, 3] uint8, items)]."""
    kinds, weights = tuple(questions.GENERIC), tuple(questions.GENERIC.values())
    rows = []
    for i in range(pictures):
        rng = random.Random(f"tiny/{seed}/{step}/{i}")
        scene = compose.generic_scene(rng, 1 if rng.random() < 0.5 * easy else None)
        choices = weights
        if rng.random() < LETTER_SHARE:
            scene = compose.make_scene(rng, "letter")
            choices = [{"letter": 0.7, "say": 0.3}.get(kind, 0.0) for kind in kinds]
        items = []
        while len(items) < per:
            item = questions.ask(rng, rng.choices(kinds, choices)[0], scene)
            if item is not None:
                items.append(item)
        rows.append((scene, np.asarray(render.render(scene)), items))
    return rows


def pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """The processor's output for 64 x 64 pictures: [pictures, 1, 3, 64, 64], from -1 to 1."""
    values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return ((values / 255 - 0.5) / 0.5)[:, None].contiguous()


def prefix_ids(tokenizer) -> list[int]:
    """The token ids of a user turn up to the end of its picture."""
    names = [tiny.USER, tiny.FAKE, tiny.GLOBAL, *[tiny.IMAGE] * tiny.IMAGE_TOKENS, tiny.FAKE]
    return tokenizer.convert_tokens_to_ids(names)


def pack(rows, tokenizer, drill: random.Random | None = None) -> dict:
    """One row of tokens for each picture: its image tokens, then every question with its answer.

    A question sees the picture and itself, but no other question. With `drill`, four in ten of the
    "say" questions consist of random tokens instead of text. So training reads and writes every
    token of the vocabulary, including tokens that no question or answer uses.
    """
    prefix = prefix_ids(tokenizer)
    assistant, end = tokenizer.convert_tokens_to_ids([tiny.ASSISTANT, tiny.END])
    items = [item for row in rows for item in row[2]]
    asked = tokenizer([item.question for item in items])["input_ids"]
    told = tokenizer([item.chosen for item in items])["input_ids"]
    say = tokenizer("Say:")["input_ids"]
    for i, item in enumerate(items):
        if drill is not None and item.kind == "say" and drill.random() < 0.4:
            told[i] = [
                drill.randrange(len(tiny.SPECIAL), len(tokenizer))
                for _ in range(drill.randint(2, 6))
            ]
            asked[i] = say + told[i]
    ids, places, parts, targets, weights, kinds, target_ids = [], [], [], [], [], [], []
    index = 0
    for r, row in enumerate(rows):
        line, position, part = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        for q in range(len(row[2])):
            answer = [*told[index], end]
            turn = [*asked[index], assistant, *answer[:-1]]
            first = len(line) + len(asked[index])
            targets += [(r, first + t) for t in range(len(answer))]
            target_ids += answer
            weights += [len(answer) ** -0.5] * len(answer)
            kinds += [items[index].kind] * len(answer)
            line += turn
            position += range(len(prefix), len(prefix) + len(turn))
            part += [q + 1] * len(turn)
            index += 1
        ids.append(line)
        places.append(position)
        parts.append(part)
    part = torch.tensor(padded(parts, -1))
    causal = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()
    own = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    return {
        "input_ids": torch.tensor(padded(ids, 0)),
        "position_ids": torch.tensor(padded(places, 0)),
        "mask": (causal & own)[
            :, None
        ],  # [pictures, 1, tokens, tokens], True where a token may attend
        "pixel_values": pixels([row[1] for row in rows]),
        "targets": tuple(torch.tensor(t) for t in zip(*targets, strict=True)),
        "target_ids": torch.tensor(target_ids),
        "target_weight": torch.tensor(weights),
        "target_kind": kinds,
    }


def padded(rows: list[list[int]], value: int) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [value] * (longest - len(row)) for row in rows]


def forward(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the answers [targets, vocabulary], patches [n, 64, d], image tokens [n, 16, d]."""
    core = model.model
    seen = core.get_image_features(batch["pixel_values"], return_dict=True)
    embeds = core.text_model.get_input_embeddings()(batch["input_ids"])
    tokens = torch.stack(list(seen.pooler_output))
    embeds = core.inputs_merger(batch["input_ids"], embeds, tokens)
    hidden = core.text_model(
        inputs_embeds=embeds,
        attention_mask=batch["mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch["targets"]]), seen.last_hidden_state, tokens


@torch.no_grad()
def score(model, tokenizer, seed: int, count: int) -> dict[str, float]:
    """Exact match by kind on held-out scenes.

    A greedy decoder gives the expected answer exactly when each of its tokens, the end token
    included, is the most likely token after the tokens before it. So one forward pass with the
    right answer as input is enough.
    """
    model.eval()
    right, asked, step = defaultdict(int), defaultdict(int), 0
    while sum(asked.values()) < count:
        rows = sample(seed, -1 - step, 50, 4)
        batch = pack(rows, tokenizer)
        guess = forward(model, batch)[0].argmax(-1) == batch["target_ids"]
        lengths = [
            len(ids) + 1
            for ids in tokenizer([i.chosen for row in rows for i in row[2]])["input_ids"]
        ]
        for item, hits in zip(
            [i for row in rows for i in row[2]], guess.split(lengths), strict=True
        ):
            right[item.kind] += bool(hits.all())
            asked[item.kind] += 1
        step += 1
    model.train()
    scores = {kind: right[kind] / asked[kind] for kind in questions.GENERIC if asked[kind]}
    return {"all": sum(right.values()) / sum(asked.values()), **scores}


def save_state(work: Path, model, head, optimizers, step: int, minutes: float) -> None:
    state = {
        "model": model.state_dict(),
        "head": head.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "minutes": minutes,
    }
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")


def resume(work: Path, model, head, optimizers) -> tuple[int, float]:
    """Loads the last state; returns its step and the minutes spent until that step."""
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    head.load_state_dict(state["head"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        peak = optimizer.param_groups[0]["peak"]
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["peak"] = peak  # from this command, not from the interrupted run
    return state["step"], state["minutes"]


def note(path: Path, model, args, step: int, minutes: float, scores: dict[str, float]) -> None:
    """Writes the record of the training beside the export."""
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "scripts/train_tiny.py", *sys.argv[1:]]),
        "device": f"CPU, {args.threads} thread, {platform.machine()}, torch {torch.__version__}",
        "seed": args.seed,
        "steps": step,
        "answers_trained_on": step * args.pictures * args.questions,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "exact_match_held_out": {k: round(v, 4) for k, v in scores.items()},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
