"""Trains the tiny model on drawn scenes: `python -m capa_export.testbed.train --out DIR`."""

# Shapes: B pictures, N patches or cells, W windows, T tokens of a packed row, H hidden width.

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from capa_export.testbed.batches import CELLS, NUM_VISUAL, Batches, Stage
from capa_export.testbed.evaluate import evaluate
from capa_export.testbed.scenes import (
    COLORS,
    KINDS,
    SHAPES,
)
from capa_export.testbed.tiny_qwen25vl import (
    build_model,
    build_tokenizer,
    save_checkpoint,
)

__all__ = ["main", "packed_hidden", "train", "visual_tokens"]

PEAK_LR = 1e-3
WARMUP_STEPS = 200
SAVE_SECONDS = 180.0


_EASY = {"color_of": 6, "shape_of": 4}
_ALL = {"color_of": 3, "shape_of": 2, "exists": 3, "same": 2}

# All kinds at once from the start never leave "some colour that is in the picture".
STAGES = (
    Stage(until=0.12, num_sprites=(2, 3), clutter=0.0, asked=_EASY),
    Stage(until=0.20, num_sprites=(3, 5), clutter=0.0, asked=_EASY),
    Stage(until=0.50, num_sprites=(4, 7), clutter=0.3, asked=_ALL),
    Stage(until=1.00, num_sprites=(4, 7), clutter=0.85, asked=_ALL),
)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def visual_tokens(model: Qwen2_5_VLForConditionalGeneration, patches_BNP: Tensor) -> Tensor:
    """The vision tower on a batch of 8 x 8 cell pictures, windows as a batch dimension."""
    tower: Any = model.model.visual
    batch, side, window = patches_BNP.shape[0], 2, CELLS // 2
    patch = torch.arange(NUM_VISUAL * 4)
    row = patch // (4 * CELLS) * 2 + patch // 2 % 2
    col = patch // 4 % CELLS * 2 + patch % 2
    angles = tower.rotary_pos_emb(patches_BNP, torch.stack([row, col], dim=-1))

    def by_window(x: Tensor) -> Tensor:
        x = x.reshape(-1, side, window, side, window, 4, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5, 6).reshape(-1, side * side, 4 * window * window, x.shape[-1])

    x = by_window(F.linear(patches_BNP, tower.patch_embed.proj.weight.flatten(1)).float())
    cos, sin = (by_window(a) for a in angles)
    for index, block in enumerate(tower.blocks):
        if index in tower.fullatt_block_indexes:
            x, cos, sin = (a.reshape(a.shape[0], 1, -1, a.shape[-1]) for a in (x, cos, sin))
        attention = block.attn
        qkv = attention.qkv(_norm(block.norm1, x))
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k = (_rotate(a, cos[:, :, None].to(a), sin[:, :, None].to(a)) for a in (q, k))
        weights = ((q * attention.scaling) @ k.mT).softmax(dim=-1)
        x = x + attention.proj((weights @ v).transpose(2, 3).flatten(-2))
        x = x + block.mlp(_norm(block.norm2, x))
    merged = tower.merger.mlp(_norm(tower.merger.ln_q, x).reshape(batch, side, side, window, window, -1))
    return merged.transpose(2, 3).reshape(batch, NUM_VISUAL, -1)


def packed_hidden(
    model: Qwen2_5_VLForConditionalGeneration, embeds_BTH: Tensor, mask_TT: Tensor, position_ids: Tensor
) -> Tensor:
    """The decoder's last hidden states, with batched matmuls: the CPU's fused attention trains slower."""
    decoder: Any = model.model.language_model
    x = embeds_BTH
    batch, length, _ = x.shape
    cos, sin = (a.to(x)[0] for a in decoder.rotary_emb(x, position_ids))
    for layer in decoder.layers:
        attention = layer.self_attn
        groups, size = attention.num_key_value_groups, attention.head_dim
        normed = _norm(layer.input_layernorm, x)
        q, k, v = (
            p(normed).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (_rotate(a, cos.to(a), sin.to(a)) for a in (q * attention.scaling, k))
        q = q.reshape(-1, groups * length, size)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        weights = torch.baddbmm(mask_TT.repeat(groups, 1).to(q), q, k.mT).softmax(dim=-1)
        mixed = (weights @ v).reshape(batch, -1, length, size).transpose(1, 2).flatten(-2)
        x = x + attention.o_proj(mixed)
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    return _norm(decoder.norm, x)


def _seen_loss(
    model: Qwen2_5_VLForConditionalGeneration, visual_BNH: Tensor, words: Tensor, targets_BN: Tensor
) -> Tensor:
    """Each visual token named against word embeddings; the first of `words` means "nothing here"."""
    table = model.model.language_model.embed_tokens.weight[words]
    logits = (visual_BNH.float() @ table.T) * 8.0
    targets = (targets_BN[..., None] == words).float().argmax(dim=-1)
    weight = torch.ones(len(words))
    weight[1:] = 10.0
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weight)


def train(
    *, state_file: Path, minutes: float | None, steps: int | None, seed: int, resume: bool
) -> Qwen2_5_VLForConditionalGeneration:
    """Trains until the wall time or the number of steps is used up, and returns the model."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    batches = Batches(tokenizer, seed)
    step, spent = 0, 0.0
    if resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = int(state["step"]), float(state["spent"])
        batches.missed.update(state["missed"])
    table = model.model.language_model.embed_tokens
    color_words, shape_words = (
        torch.tensor([batches.pad, *(batches.words[w] for w in names)]) for names in (COLORS, SHAPES)
    )
    end = tokenizer.get_vocab()["<|im_end|>"]
    right: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    last = saved = shown = time.monotonic()
    while True:
        done = step / steps if steps is not None else spent / (60 * minutes) if minutes else 1.0
        if done >= 1.0:
            return model.eval()
        stage = next(s for s in STAGES if done < s.until)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * done))
        batch = batches(step, stage)
        ids, layout = batch.ids, batch.layout
        first = batches.prefix.index(batches.pad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            visual = visual_tokens(model, batch.patches)
            text = table(ids)
            embeds = torch.cat([text[:, :first], visual.float(), text[:, first + NUM_VISUAL :]], dim=1)
            hidden = packed_hidden(model, embeds, layout.mask_TT, layout.position_ids)
        asked = (hidden[:, layout.prompt_ends] @ model.lm_head.weight.T).float()
        stopped = (hidden[:, layout.answers] @ model.lm_head.weight.T).float()
        targets = ids[:, layout.answers]
        loss = F.cross_entropy(asked.flatten(0, 1), targets.flatten())
        stop_loss = F.cross_entropy(stopped.flatten(0, 1), torch.full_like(targets, end).flatten())
        seen_weight = 0.5 * max(0.0, 1 - 2 * done)
        total = loss + 0.1 * stop_loss
        if seen_weight > 0:
            for words, targets_BN in ((color_words, batch.colors), (shape_words, batch.shapes)):
                total = total + seen_weight * _seen_loss(model, visual, words, targets_BN)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        hits = asked.argmax(dim=-1) == targets
        batches.note(batch.questions, hits.flatten().tolist())
        for kind in stage.asked:
            hit = float(hits[:, [k == kind for k in layout.kinds]].float().mean())
            right[kind] += (hit - right[kind]) * 0.03
        now = time.monotonic()
        spent, last = spent + now - last, now
        if now - shown > 15:
            shown = now
            left = spent * (1 - done) / max(done, 1e-3) / 60
            shares = " ".join(f"{kind} {100 * share:.0f}" for kind, share in right.items())
            progress = f"step {step} {100 * done:.1f}% loss {float(loss.detach()):.3f}"
            print(f"{progress} | {shares} | {left:.0f} min left", file=sys.stderr, flush=True)
        if now - saved > SAVE_SECONDS:
            saved = now
            weights, moments = model.state_dict(), optimizer.state_dict()
            counts = {"step": step, "spent": spent, "missed": batches.missed}
            state = {"model": weights, "optimizer": moments, **counts}
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, state_file)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
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
    minutes = None if args.steps is not None else args.minutes
    model = train(state_file=state_file, minutes=minutes, steps=args.steps, seed=args.seed, resume=args.resume)
    save_checkpoint(out, model, build_tokenizer())
    accuracy = evaluate(out)
    text = json.dumps(accuracy, indent=2)
    (out / "evaluation.json").write_text(text + "\n", encoding="ascii")
    print(text)


if __name__ == "__main__":
    main()
