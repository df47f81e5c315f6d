"""Trains a test bed on drawn scenes: `python -m benchmarks.tiny.train --model tiny-qwen25vl --out DIR`."""

# Shapes: B rows, P pictures of all rows, N cells, T tokens of a packed row, H hidden width.

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny.batches import Batch, Batches, RowLayout
from benchmarks.tiny.beds import BEDS, Bed, family_of, load_bed
from benchmarks.tiny.curriculum import BASIC, FURTHER, Phase
from benchmarks.tiny.decoder import packed_hidden
from benchmarks.tiny.distil import Teacher, go_on_from
from benchmarks.tiny.evaluate import evaluate
from benchmarks.tiny.parallel import average, join, num_processes, rank

__all__ = ["answer_logits", "lesson_loss", "main", "save_checkpoint", "train"]

PEAK_LR = 1e-3
WARMUP_STEPS = 100
SAVE_SECONDS = 180.0


@dataclass(kw_only=True)
class Progress:
    """The state of a training, saved with the weights."""

    distilled: int = 0
    """Steps of imitating the teacher's visual tokens."""
    step: int = 0
    """Steps of answering questions."""
    spent: float = 0.0
    """Seconds of answering questions."""
    missed: dict[str, float] = field(default_factory=dict)


class Training:
    """A model with its optimizer, where it stands, and the file that both are kept in."""

    def __init__(self, model: Any, state_file: Path, *, bf16: bool = False) -> None:
        self.model, self.state_file, self.bf16 = model.train(), state_file, bf16
        self.progress = Progress()
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
        self.saved = self.shown = time.monotonic()

    def load(self) -> None:
        """Goes on from the state file."""
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Writes the state file, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)
        self.saved = time.monotonic()

    def descend(self, loss: Tensor, rate: float) -> None:
        """Take one step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        average([p.grad for p in self.model.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def tell(self, line: str) -> None:
        """Says how far it is every quarter of a minute, and saves every few minutes."""
        if rank() > 0:
            return
        if time.monotonic() - self.shown > 15:
            self.shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()


def _rate(step: int, done: float) -> float:
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * done))


def answer_logits(model: Any, layout: RowLayout, ids: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of answers [B, tokens, words] and of ends [B, questions, STOPS, words], from visual tokens [P, N, H]."""
    decoder = model.model.language_model
    text = decoder.embed_tokens(ids)
    embeds = text.index_copy(1, layout.visual, visual.float().reshape(len(text), len(layout.visual), -1))
    hidden = packed_hidden(decoder, embeds, layout.mask_TT, layout.position_ids)
    answered, stopped = (model.lm_head(hidden[:, at]).float() for at in (layout.answers - 1, layout.stops))
    return answered, stopped


def _seen_loss(table_WH: Tensor, visual_PNH: Tensor, words: Tensor, targets_PN: Tensor) -> Tensor:
    """Cross-entropy of visual tokens against word embeddings; the first of `words` means "nothing here"."""
    logits = 20.0 * F.normalize(visual_PNH.float(), dim=-1) @ F.normalize(table_WH[words], dim=-1).T
    targets = (targets_PN[..., None] == words).float().argmax(dim=-1)
    weight = torch.ones(len(words))
    weight[1:] = 10.0
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weight)


def _distil(training: Training, bed: Bed, teacher: Teacher, *, steps: int, seed: int) -> None:
    progress = training.progress
    while progress.distilled < steps:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.bf16):
            loss = teacher.tower_loss(bed, training.model, seed, progress.distilled * num_processes() + rank())
        training.descend(loss, _rate(progress.distilled, progress.distilled / steps))
        progress.distilled += 1
        training.tell(f"distil {progress.distilled} of {steps} loss {float(loss.detach()):.4f}")
    if rank() == 0:
        training.save()


def lesson_loss(
    bed: Bed, model: Any, batches: Batches, batch: Batch, *, seen_weight: float, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and which questions were answered right, [B, questions].

    Args:
        bed: of the model.
        model: what is trained.
        batches: where the batch is from.
        batch: pictures and questions.
        seen_weight: how much it counts what the visual tokens themselves say.
        bf16: whether to multiply matrices in BF16.
    """
    layout, right = batch.layout, torch.empty(0, 0, dtype=torch.bool)
    loss = torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        visual = bed.visual_tokens(model, bed.pixels_from_pictures(batch.pictures))
        if layout is not None:
            answered, stopped = answer_logits(model, layout, batch.ids, visual)
            targets = batch.ids[:, layout.answers]
            ends = torch.full(stopped.shape[:-1], batches.end)
            loss = F.cross_entropy(answered.flatten(0, 1), targets.flatten())
            loss = loss + 0.1 * F.cross_entropy(stopped.flatten(0, 2), ends.flatten())
            misses = (answered.argmax(dim=-1) != targets).float()
            right = torch.zeros(len(targets), len(layout.kinds)).index_add(1, layout.of, misses) == 0
    if seen_weight > 0:
        embeddings = model.model.language_model.embed_tokens
        for sort, words in batches.sorts.items():
            # Tens and ones are told apart by the table that their words are looked up in.
            table = (model.lm_head if sort == "ones" else embeddings).weight
            loss = loss + seen_weight * _seen_loss(table, visual, words, batch.seen[sort])
    return loss, right


def _answer(
    training: Training, bed: Bed, batches: Batches, stages: tuple[Phase, ...], minutes: float | None, steps: int | None
) -> None:
    progress = training.progress
    shares: dict[str, float] = {}
    last = time.monotonic()
    while True:
        done = progress.step / steps if steps is not None else progress.spent / (60 * minutes) if minutes else 1.0
        if done >= 1.0:
            return
        stage = next(s for s in stages if done < s.until)
        lesson = stage.lessons[progress.step % len(stage.lessons)]
        batch = batches(progress.step * num_processes() + rank(), lesson)
        seen_weight = 0.5 * max(0.0, 1 - 2 * done) if lesson.asked else 0.5
        loss, right = lesson_loss(bed, training.model, batches, batch, seen_weight=seen_weight, bf16=training.bf16)
        training.descend(loss, _rate(progress.step, done))
        progress.step += 1
        if batch.layout is not None:
            batches.note(batch.questions, right.flatten().tolist())
            for kind in lesson.asked:
                share = float(right[:, [k == kind for k in batch.layout.kinds]].float().mean())
                before = shares.get(kind, share)
                shares[kind] = before + 0.03 * (share - before)
        now = time.monotonic()
        elapsed = torch.tensor([now - last])
        average([elapsed])
        progress.spent, last = progress.spent + float(elapsed), now
        left = progress.spent * (1 - done) / max(done, 1e-3) / 60
        right_by_kind = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items())
        so_far = f"step {progress.step} {100 * done:.1f}% loss {float(loss.detach()):.3f}"
        training.tell(f"{so_far} | {right_by_kind} | {left:.0f} min left")


def train(
    bed: Bed,
    *,
    state_file: Path,
    minutes: float | None,
    steps: int | None,
    seed: int,
    resume: bool,
    start: Path | None = None,
    teacher: Path | None = None,
    distil_steps: int = 0,
    size: int = 16,
    bf16: bool = False,
) -> Any:
    """Trains until the wall time or the number of steps is used up, and returns the model.

    Args:
        bed: what to train.
        state_file: is written every few minutes and at the end, and read by `resume`.
        minutes: wall time of answering questions.
        steps: the same in steps, instead.
        seed: of the start values and the scenes.
        resume: go on from `state_file`.
        start: checkpoint folder of this bed, whose weights to start from; words that are new since are added.
        teacher: checkpoint folder of another bed, whose decoder and visual tokens to start from.
        distil_steps: how long to imitate its visual tokens before the first question.
        size: rows of a batch, in each process.
        bf16: multiply matrices in BF16: faster on processors that have it, ten times slower on others.
    """
    tokenizer = bed.build_tokenizer()
    training = Training(bed.build_model(tokenizer, seed=seed), state_file, bf16=bf16)
    batches = Batches(bed, tokenizer, training.model.config, seed, size)
    if resume:
        training.load()
    elif start is not None:
        go_on_from(start, training.model)
    if teacher is not None and training.progress.step == 0:
        trained = Teacher(teacher)
        if not resume:
            trained.give_words(bed, training.model, tokenizer.get_vocab())
        _distil(training, bed, trained, steps=distil_steps, seed=seed)
    batches.missed = training.progress.missed
    _answer(training, bed, batches, FURTHER if start or teacher else BASIC, minutes, steps)
    if rank() == 0:
        training.save()
    return training.model.eval()


def save_checkpoint(folder: Path, bed: Bed, model: Any) -> None:
    """Writes a folder that the Auto classes load: weights in fp16, tokenizer, image processor."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.half().save_pretrained(folder)
    bed.build_tokenizer().save_pretrained(folder)
    bed.build_image_processor().save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=BEDS, required=True, help="the bed to train")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder of this bed to teach the hard kinds")
    parser.add_argument("--teacher", type=Path, help="checkpoint folder of another bed, that has them, to imitate")
    parser.add_argument(
        "--distil-steps", type=int, default=1500, help="steps of imitating the teacher's visual tokens (default: 1500)"
    )
    parser.add_argument("--state", type=Path, help="file for the resumable state (default: OUT.training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the state file")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step, in each process (default: 16)")
    parser.add_argument("--bf16", action="store_true", help="for processors with BF16 instructions")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=45.0, help="wall time to train for (default: 45)")
    length.add_argument("--steps", type=int, help="steps to train for, instead of a time")
    args = parser.parse_args()
    join()
    out: Path = args.out
    state_file: Path = args.state or out.with_suffix(".training")
    for folder in (out, state_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    bed = load_bed(args.model)
    model = train(
        bed,
        state_file=state_file,
        minutes=None if args.steps is not None else args.minutes,
        steps=args.steps,
        seed=args.seed,
        resume=args.resume,
        start=args.checkpoint,
        teacher=args.teacher,
        distil_steps=args.distil_steps,
        size=args.batch,
        bf16=args.bf16,
    )
    if rank() > 0:
        return
    save_checkpoint(out, bed, model)
    accuracy = evaluate(out, family_of(bed))
    text = json.dumps(accuracy, indent=2)
    (out / "evaluation.json").write_text(text + "\n", encoding="ascii")
    print(text)


if __name__ == "__main__":
    main()
