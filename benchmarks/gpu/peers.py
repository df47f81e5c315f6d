"""Hugging Face transformers on the same checkpoint, nothing removed: as it is, and compiled by torch."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import Case
from timing import wall_milliseconds
from workload import checkpoint, embeddings, prompt

__all__ = ["HuggingFaceDecoder", "cases"]

_ROUNDS, _STEPS, _WARM_UP = 10, 40, 8


def cases(work: Path) -> Iterator[Case]:
    """Prefill from embeddings on the host to logits on the host, and decode steps behind it."""
    from transformers import AutoModelForImageTextToText

    options: Any = {"dtype": torch.float16, "attn_implementation": "sdpa", "local_files_only": True}
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint(work), **options)
    model = model.cuda().eval()
    yield "HF, sdpa: memory", lambda: {"weights_GB": torch.cuda.memory_allocated() / 1e9}
    peers = {
        "HF, sdpa": HuggingFaceDecoder(model, "cuda"),
        "HF, torch.compile": HuggingFaceDecoder(model, "cuda", torch.compile),
    }
    for name, peer in peers.items():
        yield f"{name}: prefill", lambda peer=peer: {"ms": wall_milliseconds(peer.prefill, _ROUNDS)}
        yield f"{name}: decode", lambda peer=peer: {"ms": 1e3 * median(peer.decode(_STEPS)[0][_WARM_UP:])}


class HuggingFaceDecoder:
    """The decoder of a Hugging Face model with its head, as it is or compiled."""

    def __init__(self, model: Any, device: str, compiler: Callable[..., Any] | None = None) -> None:
        self.text, self.head, self.device = model.model.language_model, model.lm_head, device
        self.embeds = torch.from_numpy(embeddings(self.text.config.hidden_size)).to(model.dtype)
        self.position_ids = torch.from_numpy(prompt().position_ids)[:, None].to(device)
        self._compiled = compiler is not None
        self._fill = self._step = self._forward
        if compiler is not None:
            self._fill = compiler(self._forward, dynamic=False)
            # With CUDA graphs: a step is mostly launches.
            self._step = compiler(self._forward, dynamic=False, mode="reduce-overhead")

    def _forward(self, cache: Any, position_ids: torch.Tensor, **tokens: torch.Tensor) -> torch.Tensor:
        output = self.text(position_ids=position_ids, past_key_values=cache, use_cache=True, **tokens)
        return self.head(output.last_hidden_state[:, -1])

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Logits [1, V] on the host."""
        from transformers import DynamicCache

        embeds = self.embeds.to(self.device)
        return self._fill(DynamicCache(), self.position_ids, inputs_embeds=embeds).cpu()

    @torch.inference_mode()
    def decode(self, steps: int) -> tuple[list[float], torch.Tensor]:
        """Seconds of each step, until its logits were on the host, and the last of these [1, V]."""
        from transformers import DynamicCache, StaticCache

        length = self.embeds.shape[1]
        # A cache that grows has another shape at every step, and each would be compiled.
        static = self._compiled
        cache: Any = StaticCache(self.text.config, max_cache_len=length + steps) if static else DynamicCache()
        logits = self._forward(cache, self.position_ids, inputs_embeds=self.embeds.to(self.device)).cpu()
        seconds: list[float] = []
        for step in range(steps):
            started = time.perf_counter()
            token = logits.argmax(-1, keepdim=True).to(self.device)
            position_ids = torch.full((3, 1, 1), length + step, device=self.device)
            logits = self._step(cache, position_ids, input_ids=token).cpu()
            seconds.append(time.perf_counter() - started)
        return seconds, logits
