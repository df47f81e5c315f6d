"""Trains a test bed on drawn scenes: `python -m capa_export.testbed.train --model tiny-qwen25vl --out DIR`."""

# Shapes: B pictures, N cells, T tokens of a packed row, H hidden width.

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

from capa_export.testbed.batches import Batch, Batches, Stage
from capa_export.testbed.beds import BEDS, NUM_VISUAL, Bed, family_of, load_bed
from capa_export.testbed.decoder import packed_hidden
from capa_export.testbed.distil import Teacher
from capa_export.testbed.evaluate import evaluate
from capa_export.testbed.scenes import COLORS, KINDS, SHAPES

__all__ = ["HARD", "STAGES", "answer_logits", "main", "save_checkpoint", "train"]

PEAK_LR = 1e-3
WARMUP_STEPS = 200
SAVE_SECONDS = 180.0

_EASY = {"color_of": 6, "shape_of": 4}
_ALL = {"color_of": 3, "shape_of": 2, "exists": 3, "same": 2}

HARD = Stage(until=1.00, num_sprites=(4, 7), clutter=0.85, asked=_ALL)
# All kinds at once from the start never leave "some colour that is in the picture".
STAGES = (
    Stage(until=0.12, num_sprites=(2, 3), clutter=0.0, asked=_EASY),
    Stage(until=0.20, num_sprites=(3, 5), clutter=0.0, asked=_EASY),
    Stage(until=0.50, num_sprites=(4, 7), clutter=0.3, asked=_ALL),
    HARD,
)


@dataclass(kw_only=True)
class Progress:
    """How far a training is; saved with the weights."""

    distilled: int = 0
    """Steps of imitating the teacher's visual tokens."""
    step: int = 0
    """Steps of answering questions."""
    spent: float = 0.0
    """Seconds of answering questions."""
    missed: dict[str, float] = field(default_factory=dict)


class Training:
    """A model with its optimizer, where it stands, and the file that both are kept in."""

    def __init__(self, model: Any, state_file: Path) -> None:
        self.model, self.state_file = model.train(), state_file
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
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def tell(self, line: str) -> None:
        """Says how far it is every quarter of a minute, and saves every few minutes."""
        if time.monotonic() - self.shown > 15:
            self.shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()


def _rate(step: int, done: float) -> float:
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * done))


def answer_logits(bed: Bed, model: Any, batches: Batches, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of answers [B, questions, words] and of ends [B, questions, STOPS, words], and visual tokens."""
    first, layout = batches.first, batch.layout
    decoder = model.model.language_model
    visual = bed.visual_tokens(model, bed.pixels_from_pictures(batch.pictures))
    text = decoder.embed_tokens(batch.ids)
    embeds = torch.cat([text[:, :first], visual.float(), text[:, first + NUM_VISUAL :]], dim=1)
    hidden = packed_hidden(decoder, embeds, layout.mask_TT, layout.position_ids)
    answered, stopped = (model.lm_head(hidden[:, at]).float() for at in (layout.prompt_ends, layout.stops))
    return answered, stopped, visual


def _seen_loss(table_WH: Tensor, visual_BNH: Tensor, words: Tensor, targets_BN: Tensor) -> Tensor:
    """Each visual token named against word embeddings; the first of `words` means "nothing here"."""
    logits = (visual_BNH.float() @ table_WH[words].T) * 8.0
    targets = (targets_BN[..., None] == words).float().argmax(dim=-1)
    weight = torch.ones(len(words))
    weight[1:] = 10.0
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weight)


def _distil(training: Training, bed: Bed, teacher: Teacher, *, steps: int, seed: int) -> None:
    progress = training.progress
    while progress.distilled < steps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = teacher.tower_loss(bed, training.model, seed, progress.distilled)
        training.descend(loss, _rate(progress.distilled, progress.distilled / steps))
        progress.distilled += 1
        training.tell(f"distil {progress.distilled} of {steps} loss {float(loss.detach()):.4f}")
    training.save()


def _answer(
    training: Training, bed: Bed, batches: Batches, stages: tuple[Stage, ...], minutes: float | None, steps: int | None
) -> None:
    model, progress = training.model, training.progress
    color_words, shape_words = (
        torch.tensor([batches.pad, *(batches.words[w] for w in names)]) for names in (COLORS, SHAPES)
    )
    right: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    last = time.monotonic()
    while True:
        done = progress.step / steps if steps is not None else progress.spent / (60 * minutes) if minutes else 1.0
        if done >= 1.0:
            return
        stage = next(s for s in stages if done < s.until)
        batch = batches(progress.step, stage)
        targets = batch.ids[:, batch.layout.answers]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answered, stopped, visual = answer_logits(bed, model, batches, batch)
        loss = F.cross_entropy(answered.flatten(0, 1), targets.flatten())
        ends = torch.full(stopped.shape[:-1], batches.end)
        total = loss + 0.1 * F.cross_entropy(stopped.flatten(0, 2), ends.flatten())
        seen_weight = 0.5 * max(0.0, 1 - 2 * done)
        if seen_weight > 0:
            table = model.model.language_model.embed_tokens.weight
            for words, targets_BN in ((color_words, batch.colors), (shape_words, batch.shapes)):
                total = total + seen_weight * _seen_loss(table, visual, words, targets_BN)
        training.descend(total, _rate(progress.step, done))
        progress.step += 1
        hits = answered.argmax(dim=-1) == targets
        batches.note(batch.questions, hits.flatten().tolist())
        for kind in stage.asked:
            hit = float(hits[:, [k == kind for k in batch.layout.kinds]].float().mean())
            right[kind] += (hit - right[kind]) * 0.03
        now = time.monotonic()
        progress.spent, last = progress.spent + now - last, now
        left = progress.spent * (1 - done) / max(done, 1e-3) / 60
        shares = " ".join(f"{kind} {100 * share:.0f}" for kind, share in right.items())
        so_far = f"step {progress.step} {100 * done:.1f}% loss {float(loss.detach()):.3f}"
        training.tell(f"{so_far} | {shares} | {left:.0f} min left")


def train(
    bed: Bed,
    *,
    state_file: Path,
    minutes: float | None,
    steps: int | None,
    seed: int,
    resume: bool,
    teacher: Path | None = None,
    distil_steps: int = 0,
) -> Any:
    """Trains until the wall time or the number of steps is used up, and returns the model.

    Args:
        bed: what to train.
        state_file: is written every few minutes and at the end, and read by `resume`.
        minutes: wall time of answering questions.
        steps: the same in steps, instead.
        seed: of the start values and the scenes.
        resume: go on from `state_file`.
        teacher: checkpoint folder of a trained bed, whose decoder and visual tokens to start from.
        distil_steps: how long to imitate its visual tokens before the first question.
    """
    tokenizer = bed.build_tokenizer()
    training = Training(bed.build_model(tokenizer, seed=seed), state_file)
    batches = Batches(bed, tokenizer, training.model.config, seed)
    if resume:
        training.load()
    if teacher is not None and training.progress.step == 0:
        trained = Teacher(teacher)
        if not resume:
            trained.give_words(bed, training.model, tokenizer.get_vocab())
        _distil(training, bed, trained, steps=distil_steps, seed=seed)
    batches.missed = training.progress.missed
    _answer(training, bed, batches, (HARD,) if teacher else STAGES, minutes, steps)
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
    parser.add_argument("--teacher", type=Path, help="checkpoint folder of a trained bed to start from")
    parser.add_argument(
        "--distil-steps", type=int, default=1500, help="steps of imitating the teacher's visual tokens (default: 1500)"
    )
    parser.add_argument("--state", type=Path, help="file for the resumable state (default: OUT.training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the state file")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=45.0, help="wall time to train for (default: 45)")
    length.add_argument("--steps", type=int, help="steps to train for, instead of a time")
    args = parser.parse_args()
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
        teacher=args.teacher,
        distil_steps=args.distil_steps,
    )
    save_checkpoint(out, bed, model)
    accuracy = evaluate(out, family_of(bed))
    text = json.dumps(accuracy, indent=2)
    (out / "evaluation.json").write_text(text + "\n", encoding="ascii")
    print(text)


if __name__ == "__main__":
    main()
